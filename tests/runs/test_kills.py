"""Real processes, killed with real signals: nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import dask
import pandas as pd
import psutil
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.runs import driver as drivers
from tests.support.driver import BATCH_ROWS
from tests.support.patience import patient, until

N_FILES, ROWS_PER_FILE = 20, 50
N_ROWS = N_FILES * ROWS_PER_FILE


@pytest.fixture
def job(claims, tmp_path):
    folder = claims(n_files=N_FILES, n_rows=ROWS_PER_FILE)
    log, out = tmp_path / "log", tmp_path / "out"

    def start(*options):
        driver = [sys.executable, "-m", "tests.support.driver"]
        command = [*driver, folder, str(log), str(out), *options]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)

    start.log, start.out = log, out
    return start


def batches(log):
    text = log.read_text() if log.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last may still be written
    return [(int(pid), [int(i) for i in rows.split(",")]) for pid, rows in map(str.split, lines)]


def wait_for(log, n_batches, driver):
    until(lambda: len(batches(log)) >= n_batches or driver.poll() is not None, 60)
    assert driver.poll() is None


def finish(driver):
    _, said = driver.communicate(timeout=patient(100))
    assert driver.returncode == 0, said


def check(job, n_twice_at_most, n_rows=N_ROWS, n_kills=1):
    found = pd.read_parquet(job.out)
    assert found.id.tolist() == list(range(n_rows))
    assert (found.twice == found.id * 2).all()
    computed = Counter(i for _, rows in batches(job.log) for i in rows)
    assert set(computed) == set(range(n_rows))
    assert computed.total() - n_rows <= n_twice_at_most
    if n_kills == 1:  # the last run tells; what was called counts, whether or not it was finished
        report = json.loads(Path(job.out, "_pcm", "report.json").read_text())
        # A call is noted before it is made: killed between the two, it counts.
        assert report["rows_recomputed"] - (computed.total() - n_rows) in (0, BATCH_ROWS)
    assert not list(Path(job.out, "_pcm").glob("run-*"))


def test_a_worker_that_is_killed_costs_what_it_had_in_hand(job):
    driver = job()
    wait_for(job.log, 30, driver)
    busiest = Counter(pid for pid, _ in batches(job.log)).most_common(1)[0][0]
    os.kill(busiest, signal.SIGKILL)
    finish(driver)
    check(job, n_twice_at_most=2 * BATCH_ROWS)  # it has two lanes


def test_killed_as_a_whole_the_same_run_goes_on(job):
    driver = job()
    wait_for(job.log, 50, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    finish(job())
    check(job, n_twice_at_most=4 * BATCH_ROWS)


def test_workers_end_when_their_driver_dies_and_its_output_goes_on(job):
    driver = job()
    wait_for(job.log, 30, driver)
    workers = list(psutil.Process(driver.pid).children(recursive=True))
    assert workers
    os.kill(driver.pid, signal.SIGKILL)  # the driver alone
    driver.communicate()
    _gone, alive = psutil.wait_procs(workers, timeout=patient(20))
    assert not alive
    finish(job())
    check(job, n_twice_at_most=4 * BATCH_ROWS)


def kill_twice_and_finish(job, option, n_batches):
    """Killed as a whole and the driver alone, each time in the midst of its work."""
    for kill in (os.killpg, os.kill):
        driver = job(option)
        wait_for(job.log, len(batches(job.log)) + n_batches, driver)
        workers = psutil.Process(driver.pid).children(recursive=True)
        kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        psutil.wait_procs(workers, timeout=patient(20))
    finish(job(option))


def test_killed_while_it_computes_failed_rows_again(job):
    broken = Path(f"{job.log}.broken")
    broken.touch()
    finish(job())
    failed = pd.read_parquet(job.out).set_index("id")["error"].dropna()
    assert failed.index.tolist() == list(range(3, N_ROWS, 10))
    broken.unlink()
    job.log.unlink()
    kill_twice_and_finish(job, "retry_failed", n_batches=3)
    found = pd.read_parquet(job.out)
    assert found.id.tolist() == list(range(N_ROWS))
    assert (found.twice == found.id * 2).all() and found.error.isna().all()
    computed = Counter(i for _, rows in batches(job.log) for i in rows)
    assert set(computed) == set(failed.index)  # those that had failed, and no others
    assert computed.total() - len(failed) <= 2 * 4 * ROWS_PER_FILE / 10


def test_killed_while_it_takes_in_new_files(job, tmp_path):
    finish(job())
    for number in range(N_FILES):
        ids = range(N_ROWS + number * 50, N_ROWS + number * 50 + 50)
        frame = pd.DataFrame({"id": ids, "claim": "a claim"})
        frame.to_parquet(tmp_path / "claims" / f"part-{N_FILES + number}.parquet", index=False)
    kill_twice_and_finish(job, "extend", n_batches=30)
    check(job, n_twice_at_most=2 * 4 * BATCH_ROWS, n_rows=2 * N_ROWS, n_kills=2)


@pytest.fixture
def small_disk(tmp_path):
    """A real filesystem of 1 MiB; called, it has so many MiB."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", place]
        return subprocess.run(command, capture_output=True, text=True)

    done = mount("-o", "size=1m")
    if done.returncode:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    mount.place, mount.grow = place, lambda: mount("-o", "remount,size=64m")
    yield mount
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full_in_the_midst_of_a_run(client, claims, small_disk):
    def wide(frame, live):
        return pd.DataFrame({"id": frame["id"], "noise": [os.urandom(2_000) for _ in frame["id"]]})

    verdicts = pcm.map_partitions(
        wide,
        pcm.read_parquet(claims(n_files=N_FILES, n_rows=ROWS_PER_FILE)),
        context=pcm.Context(list),
        meta={"id": "i8", "noise": pd.ArrowDtype(pa.binary())},
        batch_rows=10,
    )
    out = small_disk.place / "out"
    with pytest.raises(pcm.PCMError, match=r"no room left for .*the output"):
        pcm.write_parquet(verdicts, out, progress=False)
    n_there = len(pd.read_parquet(out))  # whatever is there is whole
    assert 0 < n_there < N_ROWS
    assert small_disk.grow().returncode == 0
    report = pcm.write_parquet(verdicts, out, progress=False).report
    # What was finished and not committed is resumed, too.
    assert report.rows == N_ROWS and n_there <= report.rows_resumed < N_ROWS
    assert pd.read_parquet(out).id.tolist() == list(range(N_ROWS))


def test_a_killed_workers_results_that_nobody_has_taken_yet(claims, tmp_path, monkeypatch):
    """One worker, and a driver that takes its time: results are lost with the worker."""
    read = drivers.read_requests
    monkeypatch.setattr(drivers, "read_requests", lambda output: time.sleep(0.4) or read(output))

    def slow(frame, live):
        time.sleep(0.05)
        return pd.DataFrame({"id": frame["id"]})

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        dask.config.set({"pcm.run.unit-seconds": "0.1s"}),
    ):
        verdicts = pcm.map_partitions(
            slow,
            pcm.read_parquet(claims(n_files=N_FILES, n_rows=ROWS_PER_FILE)),
            context=pcm.Context(list),
            meta={"id": "i8"},
            batch_rows=10,
        )
        run = pcm.write_parquet(verdicts, tmp_path / "out", wait=False)
        for n_rows in (100, 300, 500):
            while run.progress.done < n_rows:
                assert run.status in ("starting", "running")
                time.sleep(0.01)
            (pid,) = client.run(os.getpid).values()
            os.kill(pid, signal.SIGKILL)
        assert run.wait(patient(60)).rows == N_ROWS
    assert pd.read_parquet(tmp_path / "out").id.tolist() == list(range(N_ROWS))


def paused(job):
    """A driver that is at work and waits; and a handle on its run."""
    driver = job()
    wait_for(job.log, 10, driver)
    run = pcm.attach(job.out)
    run.pause()
    until(lambda: run.status == "paused" or driver.poll() is not None)
    assert driver.poll() is None
    return driver, run


def test_a_second_driver_is_told_who_is_at_work(job):
    first, run = paused(job)
    second = job()
    _, said = second.communicate(timeout=patient(100))
    assert second.returncode == 1
    assert "BusyError: Another run is at work" in said and f"process {first.pid} of" in said
    run.resume()
    assert run.wait(patient(60)).state == "finished"
    finish(first)
    check(job, n_twice_at_most=0)


def test_a_second_driver_may_take_over_from_one_that_still_works(job):
    """Whatever the first still computes is shut out; the rows are there once."""
    first, _ = paused(job)
    second = job("take_over")
    _, said = first.communicate(timeout=patient(100))
    finish(second)
    assert first.returncode == 1 and "replaced by a newer one" in said
    check(job, n_twice_at_most=4 * BATCH_ROWS)
