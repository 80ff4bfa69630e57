"""Partitions with few rows share calls of a function, in ``compute()`` on a real worker."""

from __future__ import annotations

import os
import signal
import time

import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, worker_client

import dask_pcm as pcm
from dask_pcm.errors import RowCountError
from tests.conftest import validated_cluster
from tests.support.patience import patient

N_ROWS, BATCH_ROWS = 120, 16
META = {"id": "i8", "verdict": "str"}


def load():
    return "model"


MODEL = pcm.Context(load)


@pytest.fixture(scope="module")
def worker():
    with validated_cluster(n_workers=1) as cluster:
        yield cluster


@pytest.fixture
def client(worker):
    with Client(worker) as one:
        pcm.install(one)
        yield one


@pytest.fixture
def run(client, tmp_path):
    """Compute a function of rows in partitions; returns what it gives, and the rows of each call.

    With ``log``, the function gets a file in which to note its calls.
    """

    def compute(func, frame, context=MODEL, **options):
        log = tmp_path / "calls"
        log.touch()
        mapped = pcm.map_partitions(
            func, frame, str(log), context=context, meta=META, batch_rows=BATCH_ROWS, **options
        )
        found = mapped.compute()
        return found, [[int(i) for i in line.split()] for line in log.read_text().splitlines()]

    return compute


def rows(n_partitions, index=None):
    ids = pd.DataFrame({"id": range(N_ROWS), "claim": [f"claim {i}" for i in range(N_ROWS)]})
    if index is not None:
        ids.index = index
    return dd.from_pandas(ids, npartitions=n_partitions, sort=False)


def note(log, frame):
    with open(log, "a") as file:
        file.write(" ".join(map(str, frame["id"])) + "\n")


def verify(frame, model, log):
    note(log, frame)
    time.sleep(0.05)
    return pd.DataFrame({"id": frame["id"], "verdict": f"{model} says " + frame["claim"]})


def expected(index=None):
    verdicts = [f"model says claim {i}" for i in range(N_ROWS)]
    return pd.DataFrame({"id": range(N_ROWS), "verdict": verdicts}, index=index)


def assert_right(found, index=None):
    pd.testing.assert_frame_equal(
        found[["id", "verdict"]], expected(index), check_dtype=False, check_index_type=False
    )
    assert found["error"].isna().all()


def test_partitions_of_a_row_share_calls(run):
    found, calls = run(verify, rows(N_ROWS))
    assert_right(found)
    assert sorted(i for call in calls for i in call) == list(range(N_ROWS))  # each row once
    assert BATCH_ROWS / 4 < max(map(len, calls)) <= BATCH_ROWS
    assert len(calls) <= N_ROWS / 3


def test_partitions_of_a_batch_or_more_have_calls_of_their_own(run):
    found, calls = run(verify, rows(4))
    assert_right(found)
    assert sorted(map(len, calls)) == [14] * 4 + [16] * 4


def three(k, index=None):
    """The rows of a file of three; they count from zero, as other readers than ours have it."""
    ids = range(3 * k, 3 * k + 3)
    return pd.DataFrame({"id": ids, "claim": [f"claim {i}" for i in ids]}, index=index)


@pytest.mark.parametrize(
    "own, shares",
    [
        (lambda k: [f"row {3 * k + i}" for i in range(3)], True),
        (lambda k: None, True),
        (lambda k: ["a", "b", "c"], False),  # the function may go by it
    ],
)
def test_rows_keep_their_index_even_if_it_repeats(run, own, shares):
    frame = dd.from_map(lambda k: three(k, own(k)), range(N_ROWS // 3))
    found, calls = run(verify, frame)
    assert_right(found, [i for k in range(N_ROWS // 3) for i in own(k) or range(3)])
    assert (max(map(len, calls)) > 3) == shares


def fails_on_55(frame, model, log):
    found = verify(frame, model, log)
    if 55 in frame["id"].values:
        raise ValueError("55 is bad")
    return found


def test_a_row_that_fails_changes_no_other(run):
    found, calls = run(fails_on_55, rows(N_ROWS))
    assert found.id.tolist() == list(range(N_ROWS))
    assert found.index[found["error"].notna()].tolist() == [55]
    assert found["error"][55] == "ValueError: 55 is bad"
    good = found[found["error"].isna()]
    assert good["verdict"].tolist() == [f"model says claim {i}" for i in good["id"]]
    assert sum(55 in call for call in calls) <= 6  # halves of a call of 16


def fails_always(frame, model, log):
    note(log, frame)
    raise ValueError("no row is good")


def test_a_function_that_fails_on_all_rows_raises_its_own_error(run):
    with pytest.raises(ValueError, match="no row is good"):
        run(fails_always, rows(N_ROWS))


def returns_less(frame, model, log):
    return verify(frame, model, log).iloc[1:]


def test_a_function_that_returns_fewer_rows_is_told_so(run):
    with pytest.raises(RowCountError, match="got 1 rows and returned 0"):
        run(returns_less, rows(N_ROWS))


def asks_others(frame, model, log):
    with worker_client() as client:  # leaves its lane, and comes back
        assert client.submit(sum, [1, 2]).result() == 3
    return verify(frame, model, log)


def test_a_function_may_wait_for_other_tasks(run):
    found, calls = run(asks_others, rows(40))
    assert_right(found)
    assert max(map(len, calls)) > 3


def test_functions_that_use_a_context_at_the_same_time_have_calls_of_their_own(run):
    found, calls = run(verify, rows(N_ROWS // 3), pcm.Context(load, exclusive=False))
    assert_right(found)
    assert max(map(len, calls)) == 3


def dies_once(frame, model, log):
    with open(f"{log}.begun", "a") as file:
        file.write("x")
    if os.path.getsize(f"{log}.begun") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return verify(frame, model, log)


def test_tasks_of_a_worker_that_is_lost_run_again_on_their_own(run):
    found, calls = run(dies_once, rows(N_ROWS))
    assert_right(found)
    assert len([call for call in calls if len(call) == 1]) >= 2


def fails_to_load():
    raise OSError("no such file")


def test_that_a_context_does_not_load_reaches_every_task(run):
    with pytest.raises(pcm.errors.LoadError, match="no such file"):
        run(verify, rows(N_ROWS), pcm.Context(fails_to_load))


def test_two_functions_take_turns(client, tmp_path):
    log = tmp_path / "calls"
    frames = [
        pcm.map_partitions(
            func, rows(N_ROWS), str(log), context=MODEL, meta=META, batch_rows=BATCH_ROWS
        )
        for func in (verify, fails_on_55)
    ]
    first, second = (one.result(patient(100)) for one in client.compute(frames))
    assert_right(first)
    assert second.index[second["error"].notna()].tolist() == [55]
