from __future__ import annotations

import traceback
import weakref

import pandas as pd
import pytest

from dask_pcm.errors import UserFunctionError
from dask_pcm.plugins.worker.stats import Tally, pack, unpack
from dask_pcm.scheduling.rules.first_batches import Failing

ROW = pd.DataFrame({"id": [7], "claim": ["x" * 1_000]}, index=[3])


class TwoArgumentsError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one = one


class SilentError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class NeedsKeywordError(Exception):
    def __init__(self, *, lock):
        super().__init__("of a keyword")
        self.lock = lock


def raised(error):
    try:
        raise error
    except Exception as caught:
        return caught


def test_one_type_of_exception():
    tally = Tally()
    for number in range(3):
        tally.begin_batch()
        tally.fail(ROW, ValueError(number))
    assert tally.failing == Failing(3, "builtins.ValueError")
    error = unpack(tally.error)
    assert str(error) == "0"
    (note,) = error.__notes__
    assert "index 3: id=7, claim='xxx" in note and len(note) < 500
    tally.fail(ROW, KeyError())
    assert tally.failing is None


def test_a_type_that_is_defined_in_the_function():
    def infer():
        class OwnError(Exception):
            pass

        raise OwnError

    tally = Tally()
    for _ in range(2):
        tally.begin_batch()
        try:
            infer()
        except Exception as error:
            tally.fail(ROW, error)
    assert tally.failing is not None and tally.failing.kind.endswith("infer.<locals>.OwnError")


def test_what_is_kept_keeps_no_object_alive():
    class Live:
        pass

    def infer(model):
        raise ValueError

    tally, live = Tally(), Live()
    gone = weakref.ref(live)
    try:
        infer(live)
    except ValueError as error:
        tally.fail(ROW, error)
    del live
    assert gone() is None and tally.error


def test_a_row_that_succeeds():
    tally = Tally()
    tally.begin_batch()
    tally.fail(ROW, ValueError())
    tally.succeed()
    assert tally.failing is None


@pytest.mark.parametrize("error", [ValueError("v"), TwoArgumentsError(1, 2)])
def test_an_exception_comes_as_it_was_raised(error):
    error = raised(error)
    error.add_note("noted")
    found = unpack(pack(error))
    assert type(found) is type(error) and found.args == error.args
    assert found.__notes__ == ["noted"]
    assert [frame.name for frame in traceback.extract_tb(found.__traceback__)] == ["raised"]


def test_one_that_cannot_be_sent_comes_in_words():
    import threading

    found = unpack(pack(raised(NeedsKeywordError(lock=threading.Lock()))))
    assert isinstance(found, UserFunctionError)
    assert "of a keyword" in str(found) and "in raised" in str(found)


def test_one_that_has_no_text():
    found = unpack(pack(raised(SilentError())))
    assert isinstance(found, UserFunctionError) and "SilentError" in str(found)
