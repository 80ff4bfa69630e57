"""Functions that fail on every row, as ordinary Dask DataFrames on a real cluster."""

from __future__ import annotations

import logging
import re
import traceback

import dask.dataframe as dd
import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.scheduling.rules.first_batches import Failing, Frames, Position
from tests.support.patience import until

LLM = pcm.Context(lambda: "model")
META = {"id": "i8"}


class MineError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fails(frame, model):
    raise MineError("this", "that")


def failing(where):
    def infer(frame, model):
        if where(frame["id"]).any():
            raise ValueError("bad")
        return frame[["id"]]

    return infer


@pytest.fixture
def frame(claims):
    return pcm.read_parquet(claims())


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "distributed.worker")


def over(frame, func, batch_rows):
    return pcm.map_partitions(func, frame, context=LLM, meta=META, batch_rows=batch_rows)


def check_error(raised):
    """The user's own, with the line that raised it and a row."""
    lines = traceback.extract_tb(raised.value.__traceback__)
    assert lines[-1].name == "fails" and lines[-1].line == 'raise MineError("this", "that")'
    assert raised.value.__context__ is None
    assert re.search(r"index (\d+): id=\1, claim='claim \1'", raised.value.__notes__[0])


@pytest.mark.parametrize("batch_rows", [10, 32, 100])  # 5, 2 and 1 batches a partition
def test_a_function_that_fails_on_every_row(client, frame, batch_rows):
    verdicts = over(frame, fails, batch_rows)
    with pytest.raises(MineError, match="this and that") as raised:
        verdicts.compute()
    check_error(raised)
    with pytest.raises(MineError) as raised:
        verdicts.head()
    check_error(raised)


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_without_a_cluster(frame, scheduler):
    with pytest.raises(MineError):
        over(frame, fails, 32).compute(scheduler=scheduler)
    late = over(frame, failing(lambda ids: ids >= 150), 32).compute(scheduler=scheduler)
    assert late["error"].notna().sum() == 50


@pytest.mark.parametrize("batch_rows", [10, 32, 100])
def test_one_bad_partition_ends_nothing(client, frame, batch_rows):
    for bad in range(1, 4):
        where = failing(lambda ids, bad=bad: ids // 50 == bad)
        found = over(frame, where, batch_rows).compute()
        assert found["error"].notna().sum() == 50 and len(found) == 200


def test_partitions_without_rows_decide_nothing(client, frame):
    with pytest.raises(MineError):
        over(frame[frame.id >= 120], fails, 32).compute()
    assert len(over(frame[frame.id < 0], fails, 32).compute()) == 0


def test_a_single_row(client):
    one = dd.from_pandas(pd.DataFrame({"id": [1]}), npartitions=1)
    with pytest.raises(MineError):
        over(one, fails, 8).compute()


def test_several_types_of_exceptions_are_no_mistake_of_the_function(client, frame):
    def infer(f, model):
        raise ValueError if f["id"].iloc[0] % 2 else KeyError

    assert over(frame, infer, 1).compute()["error"].notna().all()


def test_it_may_be_mended_and_computed_again(client, frame, tmp_path):
    path = str(tmp_path / "mended")

    def infer(f, model):
        open(path).close()
        return f[["id"]]

    verdicts = over(frame, infer, 32)
    with pytest.raises(FileNotFoundError):
        verdicts.compute()

    def n_tasks(dask_scheduler):
        return len(dask_scheduler.tasks)

    # What still runs would be taken for the same tasks, and fail once more.
    until(lambda: not client.run_on_scheduler(n_tasks))
    (tmp_path / "mended").touch()
    assert verdicts.compute()["error"].isna().all()


def test_a_frame_that_is_computed_anew_begins_anew():
    computations = {"f": object()}
    frames = Frames(computations.get)
    assert not frames.note(Position("f", 0, 9), Failing(2, "V"))
    computations["f"] = object()
    assert not frames.note(Position("f", 1, 9), Failing(2, "V"))
    assert frames.note(Position("f", 0, 9), Failing(2, "V"))
    assert not frames.note(Position("f", 1, 9), Failing(2, "V"))  # told once
