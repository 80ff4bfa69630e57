"""Clusters that grow and shrink: ``adapt()``, and jobs that are replaced."""

from __future__ import annotations

import os
import signal
import sys
import time

import dask
import pandas as pd
import psutil
import pytest
from distributed import Client, LocalCluster, Scheduler, SpecCluster
from distributed.deploy.spec import ProcessInterface
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils_test import inc

import dask_pcm as pcm
from dask_pcm.plugins.scheduler.plugin import GATE
from tests.support.gated import gated, poll
from tests.support.patience import until

PATIENCE_S = 60.0


def load():
    return "model"


def slow(frame, model):
    time.sleep(0.001 * len(frame))
    return frame[["id"]]


def run_of(tmp_path, n_rows):
    pd.DataFrame({"id": range(n_rows)}).to_parquet(tmp_path / "in.parquet")
    frame = pcm.read_parquet(str(tmp_path / "in.parquet"))
    made = pcm.map_partitions(
        slow, frame, context=pcm.Context(load), meta={"id": "i8"}, batch_rows=100
    )
    return pcm.write_parquet(made, tmp_path / "out", wait=False)


def test_a_run_reaches_the_maximum_and_gives_its_workers_back(tmp_path):
    """The scheduler holds a few units of it at a time; the gate knows the rest."""
    with (
        LocalCluster(
            n_workers=0, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        cluster.adapt(minimum=0, maximum=3, interval="100ms")
        pcm.install(client)
        run = run_of(tmp_path, 20_000)
        state = cluster.scheduler.plugins[GATE].state

        def n_warm():
            return sum(bool(view.tiers) for view in list(state.workers.values()))

        until(lambda: n_warm() == 3, PATIENCE_S, "three workers are warm")
        report = run.wait(PATIENCE_S)
        assert (report.rows, report.workers, report.context_loads) == (20_000, 3, 3)
        until(lambda: not cluster.scheduler.workers, PATIENCE_S, "the workers are given back")


@gated()
async def test_plain_work_and_a_cluster_without_the_toolkit_are_answered_by_dask(c, s, gate, a, b):
    asked = type(s).adaptive_target
    futures = c.map(inc, range(10))
    assert await c.gather(futures) == list(range(1, 11))
    assert s.adaptive_target() == asked(s) == await c.scheduler.adaptive_target()
    gate.scaling.n_wanted = lambda target_s: 17
    gate.uninstall()
    assert s.adaptive_target.__func__ is asked
    assert await c.scheduler.adaptive_target() == asked(s)


class UnitSizing(SchedulerPlugin):
    """Another plugin that has something to say of how many workers there should be."""

    name = "wants"

    async def start(self, scheduler):
        scheduler.adaptive_target = scheduler.handlers["adaptive_target"] = self.answer

    def answer(self, target_duration=None):
        return 9


@gated()
async def test_another_plugin_that_answers_stays(c, s, gate, a, b):
    await c.register_plugin(UnitSizing())
    gate.uninstall()
    assert s.adaptive_target() == await c.scheduler.adaptive_target() == 9


@gated()
async def test_the_larger_of_both_answers_and_as_fast_as_was_asked(c, s, gate, a, b):
    model = pcm.Context(load)
    futures = c.map(lambda i, model: time.sleep(0.5), range(12), model=model, key="x")
    await poll(lambda: len(gate.state.placed) > 0, 10)

    def n_known():
        return len(gate.state.ahead.waiting) + len(gate.state.placed)

    assert await c.scheduler.adaptive_target() == n_known()  # nothing is known of what they take
    await c.gather(futures[:6])
    before = n_known()
    found = await c.scheduler.adaptive_target(target_duration="10ms")
    assert n_known() <= found <= before  # some may have ended since
    await c.gather(futures)


class Job(ProcessInterface):
    """A job of a batch system: ``dask worker`` in a process of its own."""

    def __init__(self, scheduler, name, **options):
        super().__init__(scheduler=scheduler, name=name)
        self.scheduler_address, self.job_name = scheduler, name

    async def start(self):
        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.scheduler_address]
        options = ["--nthreads=1", "--no-dashboard", f"--name={self.job_name}", "--no-nanny"]
        self.process = psutil.Popen([*command, *options])
        await super().start()

    async def close(self):
        self.process.kill()
        self.process.wait()
        await super().close()


class Jobs(SpecCluster):
    def __init__(self):
        scheduler = {
            "cls": Scheduler,
            # The HTTP server is there without a dashboard, too.
            "options": {"dashboard_address": ":0", "host": "127.0.0.1", "port": 0},
        }
        super().__init__(scheduler=scheduler, worker={"cls": Job, "options": {}})

    def _new_worker_name(self, worker_number):
        return f"job-{worker_number}"


@pytest.fixture
def soon():
    """Clusters look soon whether a worker that was lost is back."""
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "200ms"}):
        yield


def test_a_lost_job_is_replaced_where_the_toolkit_came_before_it(soon):
    with Jobs() as cluster, Client(cluster) as client:
        pcm.install(client)
        cluster.adapt(minimum=1, maximum=1, interval="100ms")
        client.wait_for_workers(1, PATIENCE_S)
        job = next(iter(cluster.workers.values()))
        job.process.kill()
        until(lambda: job not in cluster.workers.values(), PATIENCE_S, "the lost job is dropped")
        until(lambda: len(cluster.workers) == 1, PATIENCE_S, "another is submitted")
        client.wait_for_workers(1, PATIENCE_S)
        assert client.submit(inc, 1).result(PATIENCE_S) == 2


def test_a_local_worker_that_is_killed_stays_its_nannys_business(soon):
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        cluster.scale(1)
        client.wait_for_workers(1, PATIENCE_S)
        # The cluster notes a worker after the scheduler does.
        (nanny,) = until(lambda: list(cluster.workers.values()), PATIENCE_S)
        for _ in range(2):
            pid = nanny.pid
            os.kill(pid, signal.SIGKILL)
            until(
                lambda pid=pid: nanny.pid not in (None, pid), PATIENCE_S, "its nanny starts another"
            )
        client.wait_for_workers(1, PATIENCE_S)
        assert list(cluster.workers.values()) == [nanny]
        pcm.uninstall(client)
        assert cluster._update_worker_status.__func__ is LocalCluster._update_worker_status


def test_a_nanny_that_has_given_up_is_replaced(soon):
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        cluster.adapt(minimum=1, maximum=1, interval="100ms")
        (nanny,) = cluster.workers.values()
        client.sync(nanny.close)
        until(lambda: nanny not in cluster.workers.values(), PATIENCE_S, "it is dropped")
        client.wait_for_workers(1, PATIENCE_S)
        assert client.submit(inc, 1).result(PATIENCE_S) == 2
