"""Whose fault it is that a worker is gone; with real processes and real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client, KilledWorker, LocalCluster, Scheduler, secede

import dask_pcm as pcm
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.plugins.scheduler.tasks import attribution
from dask_pcm.plugins.scheduler.tasks.attribution import Attribution
from dask_pcm.plugins.worker.task import hold, n_losses
from tests.support.patience import until

LLM = pcm.Context(lambda: "llm", name="llm")


@pytest.fixture
def client():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        yield client


def noted(folder, name):
    """How many attempts at something there have been, this one included."""
    (folder / f"{name}.{os.getpid()}.{time.monotonic_ns()}").touch()
    return len(list(folder.glob(f"{name}.*")))


def dies(i, ctx, folder, n_times=10**9):
    """Ends its process, as native code does; the first so many times."""
    with hold([ctx.ref]):
        if noted(folder, i) <= n_times:
            os.abort()
        return i


def lives(i, ctx, seconds=0.0):
    with hold([ctx.ref]):
        time.sleep(seconds)
        return i


def suspicions(client):
    def look(dask_scheduler: Scheduler) -> list[int]:
        return [ts.suspicious for ts in dask_scheduler.tasks.values()]

    return client.run_on_scheduler(look)


def test_what_ends_its_process_again_and_again_ends_as_killed_worker(client, tmp_path):
    bad = client.submit(dies, "bad", LLM, tmp_path)
    good = client.map(lives, range(20), ctx=LLM, seconds=0.05)
    with pytest.raises(KilledWorker, match="dies"):
        bad.result(60)
    assert client.gather(good) == list(range(20))
    assert len(list(tmp_path.glob("bad.*"))) == 4  # as many as Dask allows


def test_what_was_beside_it_is_not_to_blame(tmp_path):
    """One that ends its process whenever it runs, and some that had been on the same worker."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        bad = client.submit(dies, "bad", LLM, tmp_path)
        beside = client.map(lives, range(6), ctx=LLM, seconds=0.3)
        assert client.gather(beside) == list(range(6))
        with pytest.raises(KilledWorker, match="dies"):
            bad.result(60)


def asks(i, ctx, folder):
    """Is to blame more often than is allowed, but asks, and goes on."""
    with hold([ctx.ref]):
        n_asked = n_losses()
        (folder / f"answer.{time.monotonic_ns()}.{n_asked}").touch()
        if noted(folder, i) <= 6:
            os.abort()
        return i


def test_a_task_that_asks_and_goes_on_may_cost_more(client, tmp_path):
    assert client.submit(asks, "bad", LLM, tmp_path).result(60) == "bad"
    answers = [int(p.suffix[1:]) for p in sorted(tmp_path.glob("answer.*"))]
    assert answers == [0, 1, 1, 1, 1, 1, 1]


def start_worker(scheduler, name):
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--name", name]
    command += ["--nthreads", "1", "--no-dashboard"]
    return subprocess.Popen(command, start_new_session=True)


def kill_all(process):
    """The machine takes it away: nanny, worker and all at once."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(member.pid, signal.SIGKILL)
    process.wait()


def stuck(i, ctx, folder: Path):
    with hold([ctx.ref]):
        noted(folder, i)
        while not (folder / "open").exists():
            time.sleep(0.02)
        return i


def test_preemption_is_forgiven_however_often(tmp_path):
    """The machine is taken away under a task five times; in plain Dask the fourth ends it."""
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        future = client.submit(stuck, "k", LLM, tmp_path)
        worker = start_worker(cluster.scheduler_address, "w0")
        try:
            for n in range(1, 6):
                until(lambda n=n: len(list(tmp_path.glob("k.*"))) == n)
                kill_all(worker)
                worker = start_worker(cluster.scheduler_address, f"w{n}")
            until(lambda: len(list(tmp_path.glob("k.*"))) == 6)
            assert future.status == "pending" and set(suspicions(client)) == {0}
            (tmp_path / "open").touch()
            assert future.result(30) == "k"

            def blamed(dask_scheduler: Scheduler) -> int:
                return len(dask_scheduler.plugins[GATE].losses._attribution.n_blamed)

            assert client.run_on_scheduler(blamed) == 0
        finally:
            kill_all(worker)


def test_outside_a_worker_nothing_is_lost():
    assert n_losses() == 0


def secedes_and_dies(i, ctx, folder):
    with hold([ctx.ref]):
        noted(folder, i)
    secede()
    os.abort()


def test_what_secedes_and_ends_its_process_ends_as_well(client, tmp_path):
    with pytest.raises(KilledWorker):
        client.submit(secedes_and_dies, "bad", LLM, tmp_path).result(60)
    # The gate has not forgotten it: it counts these losses like all others.
    assert len(list(tmp_path.glob("bad.*"))) == 4


class Nobody:
    """A scheduler whose nannies do not answer."""

    def rpc(self, address):
        raise OSError(address)


async def judged(losses):
    while losses._open:
        await asyncio.sleep(0.01)


def test_what_is_over_is_not_blamed_for_what_comes_later(monkeypatch):
    async def lose_and_forget():
        losses = Attribution(Nobody())
        losses.lost("nanny", ["over", "here"])
        losses.forget("over")
        losses.joined("nanny")
        return losses

    losses = asyncio.run(lose_and_forget())
    assert losses.suspects == {"here"} and losses.n_blamed == {"here": 1}


def test_a_nanny_that_was_only_out_of_reach_is_believed_later(monkeypatch):
    monkeypatch.setattr(attribution, "_GRACE_S", 0.0)

    async def lose():
        losses = Attribution(Nobody())
        losses.lost("nanny", ["k"])
        await judged(losses)
        before = dict(losses.n_blamed)
        losses.joined("nanny")
        return before, dict(losses.n_blamed)

    assert asyncio.run(lose()) == ({}, {"k": 1})


def test_without_a_nanny_it_takes_many_losses():
    async def lose(n):
        losses = Attribution(Nobody())
        for _ in range(n):
            losses.lost("", ["k"])
            await judged(losses)
        return losses.n_blamed["k"]

    assert asyncio.run(lose(20)) == 0
    assert asyncio.run(lose(24)) == 4


def test_loads_are_blamed_where_the_process_is_back_on_its_node_soon(monkeypatch):
    now, blamed = [0.0], []
    monkeypatch.setattr(attribution, "monotonic", lambda: now[0])
    losses = Attribution(Nobody())
    losses.on_loads_blamed = lambda *loads: blamed.append(loads)
    losses.lost("nanny", [], "one", ["a", "b"])
    losses.joined("another", "w2", "two")  # a worker elsewhere says nothing
    assert blamed == []
    now[0] = 30.0
    losses.joined("another", "w3", "one")  # the kernel had ended the nanny as well
    losses.joined("another", "w4", "one")
    assert blamed == [("w3", "one", ("a", "b"))]
    losses.lost("nanny", [], "one", ["a"])
    now[0] = 100.0
    losses.joined("nanny", "w5", "one")  # preempted: it took its time
    assert len(blamed) == 1
