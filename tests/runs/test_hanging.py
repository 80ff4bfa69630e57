"""Calls that never return, in real processes: ended, found, and told."""

from __future__ import annotations

import ctypes
import os
import threading

import dask
import pandas as pd
import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.errors import SchemaError
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.plan import Plan
from tests.conftest import spawning, validated_cluster

pytestmark = pytest.mark.timeout(300)
N_ROWS, BATCH_ROWS = 40, 2
TIMEOUT_S = 1.0
IMPORTS = ["distributed", "pandas", "pyarrow", "dask_pcm.runs.units.run_unit"]
#: A batch of two twice, and the row alone twice.
N_PROCESSES = 4


def hang():
    threading.Event().wait()


def hang_with_the_lock():
    """As native code does that never gives Python's lock back."""
    ctypes.PyDLL(None).sleep(100_000)


def judge(frame, live, log, hanging):
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{os.getpid()} {' '.join(map(str, frame['id']))}\n".encode())
    os.close(descriptor)
    for row, how in hanging.items():
        if row in set(frame["id"]):
            how()
    return pd.DataFrame({"id": frame["id"], "twice": frame["id"] * 2})


def job(folder, log, hanging, **options):
    return pcm.map_partitions(
        judge,
        pcm.read_parquet(folder),
        str(log),
        hanging,
        context=pcm.Context(str, str(log)),
        meta={"id": "i8", "twice": "i8"},
        batch_rows=BATCH_ROWS,
        **options,
    )


@pytest.fixture(scope="module")
def client():
    with (
        spawning(),
        dask.config.set({"pcm.worker.imports": IMPORTS}),
        validated_cluster(memory_limit="4GiB", preload_nanny=["dask_pcm.preload"]) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        yield client


def test_rows_that_hang_every_worker_fail_with_that_reason(client, claims, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    hanging = {5: hang_with_the_lock, 20: hang}
    frame = job(claims(n_files=1, n_rows=N_ROWS), log, hanging, batch_timeout=TIMEOUT_S)
    report = pcm.write_parquet(frame, out, progress=False).report
    assert (report.state, report.rows, report.rows_failed) == ("finished", N_ROWS, 2)
    found = pd.read_parquet(out)
    assert found["id"].tolist() == list(range(N_ROWS))
    failed = found[found["error"].notna()]
    assert failed["id"].tolist() == [5, 20]
    for row, text in zip(failed["id"], failed["error"], strict=True):
        assert text.startswith(
            f"LostProcessError: Row {row} of the input: took longer than batch_timeout (1 s)"
        )
    calls = [line.split() for line in log.read_text().splitlines()]
    ended = [pid for pid, *rows in calls if {"5", "20"} & set(rows)]
    assert len(ended) == 2 * N_PROCESSES


def test_the_setting_holds_for_runs_and_waiting_for_a_turn_does_not_count(client, claims, tmp_path):
    """Two lanes take turns at a context: each waits for as long as a call takes, and calls."""

    def slow(frame, live):
        threading.Event().wait(2.0)
        return frame[["id"]]

    frame = pcm.map_partitions(
        slow,
        pcm.read_parquet(claims(n_files=1, n_rows=8)),
        context=pcm.Context(str, "slow"),
        meta={"id": "i8"},
        batch_rows=2,
    )
    with dask.config.set({"pcm.run.batch-timeout": "3.5s", "pcm.run.max-unit-rows": 2}):
        report = pcm.write_parquet(frame, tmp_path / "out", progress=False).report
    assert (report.rows, report.rows_failed, report.rows_recomputed) == (8, 0, 0)


@pytest.mark.parametrize("given", [0, -1, "soon", "0s", True, float("nan")])
def test_what_is_no_time_is_refused_at_once(claims, given):
    with pytest.raises(SchemaError, match="batch_timeout must be a positive duration"):
        job(claims(n_files=1), "log", {}, batch_timeout=given)


def test_it_needs_rows_that_can_be_called_apart(claims):
    frame = pcm.read_parquet(claims(n_files=1))
    with pytest.raises(SchemaError, match="batch_timeout=5 needs batch_rows"):
        pcm.map_partitions(
            judge, frame, context=pcm.Context(str, "x"), meta={"id": "i8"}, batch_timeout=5
        )


def test_it_tells_no_jobs_apart_only_tasks(claims):
    folder = claims(n_files=1)
    one, other = job(folder, "log", {}), job(folder, "log", {}, batch_timeout="10m")
    assert manifest.identify(one.expr, True) == manifest.identify(other.expr, True)
    assert one._name != other._name
    assert Plan(other).timeout_s == 600.0
