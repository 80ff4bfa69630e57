"""Rows that end process after process, in real ones: found, and told."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections import Counter

import dask
import pandas as pd
import pytest
from distributed import Client

import dask_pcm as pcm
from tests.conftest import spawning, validated_cluster

N_ROWS, BATCH_ROWS = 200, 32
#: So that a process is soon there again.
IMPORTS = ["distributed", "pandas", "pyarrow", "s3fs", "dask_pcm.runs.units.run_unit"]
#: A batch twice, then 16, 8, 4 and 2 rows of it, and the row alone twice.
N_PROCESSES = 8


def killed():
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short


def segfault():
    ctypes.string_at(0)


def judge(frame, live, log, poison, end):
    note(log, f"{os.getpid()} {' '.join(map(str, frame['id']))}")
    if set(poison) & set(frame["id"]):
        end()
    return pd.DataFrame({"id": frame["id"], "twice": frame["id"] * 2})


def note(log, line):
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def calls(log):
    """Each call: its process, and the rows that it was given."""
    numbers = [[int(n) for n in line.split()] for line in log.read_text().splitlines()]
    return [(pid, rows) for pid, *rows in numbers]


@pytest.fixture(scope="module")
def cluster(object_store):  # whose address the workers need
    with (
        spawning(),
        dask.config.set({"pcm.worker.imports": IMPORTS}),
        validated_cluster(memory_limit="4GiB", preload_nanny=["dask_pcm.preload"]) as cluster,
    ):
        yield cluster


@pytest.fixture
def n_forgiven(caplog):
    """Losses that were taken for preemption so far: nannies that a busy machine kept silent."""
    caplog.set_level(logging.INFO, "dask_pcm.plugins.scheduler.tasks.losses")
    return lambda: sum("it was preempted" in text for text in caplog.messages)


@pytest.fixture
def run(cluster, claims, tmp_path):
    """Write what becomes of claims of which some end whoever computes them."""

    def write(poison, end=killed, n_rows=N_ROWS, batch_rows=BATCH_ROWS, out=tmp_path / "out"):
        log = tmp_path / "log"
        verdicts = pcm.map_partitions(
            judge,
            pcm.read_parquet(claims(n_files=1, n_rows=n_rows)),
            str(log),
            poison,
            end,
            context=pcm.Context(str, str(tmp_path)),
            meta={"id": "i8", "twice": "i8"},
            batch_rows=batch_rows,
        )
        with Client(cluster) as client:
            pcm.install(client)
            report = pcm.write_parquet(verdicts, out, progress=False).report
        check(out, report, calls(log), poison, n_rows)
        return calls(log)

    return write


def check(out, report, called, poison, n_rows):
    """All rows once; those that are to blame have an error, and no others."""
    found = pd.read_parquet(out)
    assert found.id.tolist() == list(range(n_rows))
    failed = found[found.error.notna()]
    assert failed.id.tolist() == list(poison) and failed.twice.isna().all()
    told = [text.partition(":")[2].partition(":")[0] for text in failed.error]
    assert told == [f" Row {row} of the input" for row in poison]
    good = found[found.error.isna()]
    assert (good.twice == good.id * 2).all()
    assert (report.rows, report.rows_failed) == (n_rows, len(poison))
    computed = Counter(row for _, rows in called for row in rows)
    assert set(computed) == set(range(n_rows))
    n_again = computed.total() - n_rows
    if "://" in str(out):  # an object store tells of rows by the unit
        assert n_again <= report.rows_recomputed
    else:
        assert report.rows_recomputed == n_again


def processes(called, poison):
    """How many processes ended with a row to blame."""
    return len([pid for pid, rows in called if set(rows) & set(poison)])


@pytest.mark.parametrize("end", [killed, segfault])
def test_a_row_that_ends_its_process_gets_an_error_and_the_others_answers(run, end, n_forgiven):
    called = run([77], end)
    assert N_PROCESSES <= processes(called, [77]) <= N_PROCESSES + n_forgiven()
    # What is finished stays so, also of its own unit: only what was in flight is computed again.
    finished = Counter(row for _, rows in called if 77 not in rows for row in rows)
    in_flight = {row for _, rows in called if 77 in rows for row in rows}
    again = [row for row, n_times in finished.items() if n_times > 1 and row not in in_flight]
    assert len(again) <= BATCH_ROWS  # beside it, when nobody knew of it


def test_two_rows_in_batches_of_their_own(run, n_forgiven):
    called = run([5, 130], os.abort, batch_rows=8)
    n_processes = 2 * (N_PROCESSES - 2)  # two halvings less
    assert n_processes <= processes(called, [5, 130]) <= n_processes + n_forgiven()


def test_a_row_in_a_unit_of_less_than_a_batch(run, n_forgiven):
    called = run([21], n_rows=30)
    assert processes(called, [21]) <= N_PROCESSES + n_forgiven()
    assert [len(rows) for _, rows in called][:2] == [30, 30]


def test_a_row_that_kills_is_found_in_an_object_store_too(run, bucket, n_forgiven):
    called = run([50], out=f"{bucket}/out")
    assert processes(called, [50]) <= N_PROCESSES + 1 + n_forgiven()
