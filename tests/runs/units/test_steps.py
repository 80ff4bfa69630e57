"""Rows on their way through several functions, and answers that functions write over."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import InputError
from tests.support.jobs import found_in, write


class Buffered:
    """Answers into an array that it uses again, with futures that are done at once."""

    is_served = True

    def __init__(self, wrong=None):
        self.wrong = wrong

    def __call__(self, frame, model):
        return self.submit(frame, model).result()

    def submit(self, frame, model):
        if self.wrong is not None:
            return self.wrong
        buffer = model.setdefault(threading.get_ident(), np.zeros(8))  # each lane has its own
        buffer[: len(frame)] = 2.0 * frame["id"]
        done = Future()
        data = {"y": buffer[: len(frame)]}
        found = pd.DataFrame(data, index=frame.index, copy=False)
        found.insert(0, "id", frame["id"])
        done.set_result(found)
        return done


def job(claims, *functions):
    frame = pcm.read_parquet(claims(n_files=3, n_rows=100))[["id"]]
    buffers = pcm.Context(dict, exclusive=False)
    for func in functions:
        frame = pcm.map_partitions(
            func, frame, context=buffers, meta={"id": "i8", "y": "f8"}, batch_rows=8
        )
    return frame


def first(frame, model):
    if (frame["id"] % 50 == 7).any():
        raise ValueError("first")
    return frame[["id"]].assign(y=2.0 * frame["id"])


def second(frame, model):
    """Fails on rows of its own, and passes no errors on."""
    if (frame["id"] % 50 == 9).any():
        raise ValueError("second")
    return frame[["id"]].assign(y=frame["y"] + 1.0)


def test_a_row_that_an_earlier_function_has_failed_on_has_its_error(client, claims, tmp_path):
    run = write(job(claims, first, second), tmp_path / "out", client=client)
    found = found_in(tmp_path / "out")
    errors = found.set_index("id")["error"].dropna()
    assert {int(i) % 50 for i in errors.index[errors.str.contains("first")]} == {7}
    assert {int(i) % 50 for i in errors.index[errors.str.contains("second")]} == {9}
    assert len(errors) == run.report.rows_failed == 12
    good = found[found["error"].isna()]
    assert (good["y"] == 2.0 * good["id"] + 1.0).all() and len(good) == 288


def test_what_is_served_from_a_buffer_that_is_used_again_is_right(client, claims, tmp_path):
    write(job(claims, Buffered()), tmp_path / "out", client=client)
    found = found_in(tmp_path / "out")
    assert (found["y"] == 2.0 * found["id"]).all() and len(found) == 300


@pytest.mark.parametrize("wrong", [pd.DataFrame({"id": [1]}), 5])
def test_what_serves_and_returns_no_future_is_named(client, claims, tmp_path, wrong):
    with pytest.raises(pcm.PCMError, match=r"submit returned .*; expected a concurrent.futures"):
        write(job(claims, Buffered(wrong)), tmp_path / "out", client=client)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rows_per_piece", v) for v in ("7", 7.5, True, 0)]
    + [("bytes_per_piece", v) for v in ("1 zorg", [1], True, 0)],
)
def test_sizes_of_pieces_that_are_none_are_refused(claims, option, value):
    with pytest.raises(InputError, match=f"{option} must be"):
        pcm.read_parquet(claims(n_files=1, n_rows=4), **{option: value})
