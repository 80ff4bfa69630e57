"""A run can be ended whatever its cluster does, and says what it waits for."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.errors import RunCancelledError
from dask_pcm.runs import gate_link as link
from dask_pcm.runs.driver import Driver
from dask_pcm.runs.gate_link import GateLink
from dask_pcm.runs.progress.progress import Progress
from dask_pcm.runs.window import Window

pytestmark = pytest.mark.timeout(300)
META = {"id": "i8", "verdict": "str"}
BAR_S = 5.0
LIMIT_S = 90.0


def until(is_so, seconds=LIMIT_S):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def load(name="model"):
    return name


class Slow:
    """A function that says that it was called, and goes on once it is let."""

    def __init__(self, folder, must_wait=True):
        self.called, self.go = Path(folder, "called"), Path(folder, "go")
        self.must_wait = must_wait

    def __call__(self, frame, model):
        self.called.write_text("")
        while self.must_wait and not self.go.exists():
            time.sleep(0.01)
        return pd.DataFrame({"id": frame["id"], "verdict": model + frame["claim"]})


def job(folder, func):
    given = pcm.read_parquet(folder)
    return pcm.map_partitions(func, given, context=pcm.Context(load), meta=META, batch_rows=10)


class Cluster:
    """A scheduler and a worker, each a process that can be frozen and killed."""

    def __init__(self, folder):
        self.logs = folder
        self.file = folder / "scheduler.json"
        options = ["--scheduler-file", str(self.file)]
        self.processes = {
            "scheduler": self.start("scheduler", *options, "--port", "0", "--no-dashboard"),
        }
        until(self.file.exists)
        self.processes["worker"] = self.start(
            "worker", *options, "--nthreads", "1", "--no-dashboard", "--no-nanny"
        )

    def start(self, kind, *options):
        with (self.logs / f"{kind}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{kind}", *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def harm(self, kind, number):
        os.killpg(self.processes[kind].pid, number)

    def close(self):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def remote(tmp_path):
    cluster = Cluster(tmp_path)
    try:
        client = Client(scheduler_file=str(cluster.file))
        client.wait_for_workers(1, timeout=LIMIT_S)
        yield cluster, client
        for process in cluster.processes.values():  # else the client's farewell has no answer
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
        client.close(timeout=2)
    finally:
        cluster.close()


@contextlib.contextmanager
def ended_at_once(error):
    """The run ends with an error, within the bar after ``asked()``."""
    at = []
    with pytest.raises(error):
        yield lambda: at.append(time.monotonic())
    assert time.monotonic() - at[0] < BAR_S


@pytest.mark.parametrize("frozen", ["scheduler", "worker"])
def test_cancelled_it_ends_at_once(remote, claims, tmp_path, frozen):
    cluster, client = remote
    slow = Slow(tmp_path)
    run = pcm.write_parquet(
        job(claims(), slow), tmp_path / "out", client=client, progress=False, wait=False
    )
    until(slow.called.exists)
    cluster.harm(frozen, signal.SIGSTOP)
    time.sleep(0.5)  # whatever it does then, it is doing it
    with ended_at_once(RunCancelledError) as asked:
        asked()
        run.cancel()
        run.wait(LIMIT_S)
    assert run.status == "cancelled"


def test_interrupted_it_ends_at_once(remote, claims, tmp_path):
    """While the scheduler is frozen."""
    cluster, client = remote
    slow = Slow(tmp_path)

    def interrupt(asked):
        until(slow.called.exists)
        cluster.harm("scheduler", signal.SIGSTOP)
        time.sleep(0.5)
        asked()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ended_at_once(KeyboardInterrupt) as asked:
            threading.Thread(target=interrupt, args=[asked]).start()
            pcm.write_parquet(job(claims(), slow), tmp_path / "out", client=client, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def waiting(claims, tmp_path, monkeypatch):
    """A run whose units have all ended, and whose workers freeze before a result has come."""
    ended, may_gather = Window.ended, threading.Event()

    def late(self, wait_s):
        return ended(self, wait_s) if may_gather.wait(wait_s) else []

    drivers, drive = [], Driver.drive
    monkeypatch.setattr(Driver, "drive", lambda *args: (drivers.append(args[0]), drive(*args)))
    monkeypatch.setattr(Window, "ended", late)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        frame = job(claims(), Slow(tmp_path, must_wait=False))
        run = pcm.write_parquet(frame, tmp_path / "out", client=client, progress=False, wait=False)
        pids = client.run(os.getpid).values()

        until(lambda: drivers)

        def are_finished():
            futures = [future for _, future in list(drivers[0].window._units.values())]
            return futures and all(future.status == "finished" for future in futures)

        until(are_finished)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        may_gather.set()
        until(lambda: drivers[0]._arriving)
        yield run, pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_results_that_are_lost_with_their_workers_are_had_from_the_ledger(waiting):
    run, pids = waiting
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    report = run.wait(LIMIT_S)
    assert (report.rows, report.rows_recomputed) == (200, 0)


def test_it_is_cancelled_while_results_are_waited_for(waiting):
    run, _ = waiting
    with ended_at_once(RunCancelledError) as asked:
        asked()
        run.cancel()
        run.wait(LIMIT_S)


def test_it_says_that_it_has_no_workers_and_goes_on_when_there_are_some(
    claims, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(link, "_LACK_S", 0.5)
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(n_workers=0, **options) as cluster, Client(cluster) as client:
        slow = Slow(tmp_path, must_wait=False)
        with caplog.at_level(logging.WARNING, "dask_pcm"):
            run = pcm.write_parquet(
                job(claims(), slow), tmp_path / "out", client=client, progress=False, wait=False
            )
            until(lambda: run.progress.lack)
        assert run.progress.lack == "no workers: the cluster has 0"
        assert run.progress.eta_s is None and "workers warm" not in str(run.progress)
        assert [r.getMessage() for r in caplog.records if "no workers" in r.getMessage()] == [
            f"The run of {tmp_path / 'out'} waits: no workers: the cluster has 0."
        ]
        cluster.scale(1)
        assert run.wait(LIMIT_S).rows == 200
        assert not run.progress.lack


def test_what_is_lacking_is_told_with_how_much_is_wanted(monkeypatch):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])  # that of the link alone
    monkeypatch.setattr("dask_pcm.runs.gate_link.time", clock)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        tested = GateLink(client, "run", (), "kind")
        answers = []
        monkeypatch.setattr(tested, "_tell", lambda *_: answers.pop(0))

        def hear(**says):
            answers.append(answered({**says, "of_a_later_version": 1}))
            tested.report(1, 1)

        hear(n_workers=2, n_on_cluster=2)
        now[0] += 9
        hear(n_workers=0, n_on_cluster=0)
        assert not tested.lack
        now[0] += 2
        hear(n_workers=0, n_on_cluster=0)
        said = "no workers: the cluster has 0 (2 wanted); cluster.scale(2) starts new ones"
        assert tested.lack == said
        hear(n_workers=0, n_on_cluster=3)
        assert "has 3, none of them with dask_pcm" in tested.lack
        hear(n_workers=1, n_on_cluster=1)
        assert not tested.lack


def answered(says):
    answer = link.Answer()
    answer.set_result(says)
    return answer


def test_progress_says_what_is_lacking_instead_of_a_time():
    waiting = Progress("running", 50, 100, per_s=10.0, lack="no workers: the cluster has 0")
    text = "running: 50/100 rows (50.0%), 0 failed, 10/s, no workers: the cluster has 0"
    assert str(waiting) == text
