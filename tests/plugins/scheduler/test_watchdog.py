"""A policy that stalls or fails; and why work is where it is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from distributed import Client, Event, LocalCluster

import dask_pcm as pcm
from dask_pcm.plugins.scheduler import watchdog as watch
from dask_pcm.plugins.worker.task import hold
from tests.support.gated import gated, poll
from tests.support.patience import patient

LLM = pcm.Context(lambda: "llm", name="llm")


def use(i, ctx=None):
    with hold([ctx.ref]) as (value,):
        return i, value


def wait_for(name, ctx=None):
    with hold([ctx.ref]):
        assert Event(name).wait(patient(30))
        return name


@pytest.fixture
def stalls(monkeypatch):
    """A policy that does nothing."""
    monkeypatch.setattr(
        watch, "decide", lambda state, now, *rules: setattr(state.plans, "actions", [])
    )


@pytest.fixture
def fails(monkeypatch):
    def decide(state, now, *rules):
        state.plans.actions = []
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(watch, "decide", decide)


def test_where_the_policy_stalls_work_goes_on_as_in_plain_dask(stalls, caplog):
    @gated(config={"pcm.gate.stall": "0.3s"})
    async def on_cluster(c, s, gate, a, b):
        futures = c.map(use, range(12), ctx=LLM)
        assert await c.gather(futures) == [(i, "llm") for i in range(12)]

    with caplog.at_level(logging.WARNING, logger="dask_pcm"):
        on_cluster()
    (first, *_) = [r.getMessage() for r in caplog.records if "workers idle" in r.getMessage()]
    assert "waits" in first and "context 'llm'" in first and "2 workers: cold" in first


def test_where_the_policy_fails_nothing_is_lost(fails, caplog):
    @gated()
    async def on_cluster(c, s, gate, a, b):
        futures = c.map(use, range(12), ctx=LLM)
        assert await c.gather(futures) == [(i, "llm") for i in range(12)]

    on_cluster()
    assert "The policy failed" in caplog.text and "ZeroDivisionError: a bug" in caplog.text


@gated(1)
async def test_a_worker_says_what_it_is(c, s, gate, a):
    (view,) = gate.state.workers.values()
    assert view.device and view.pool == view.device and view.host == "127.0.0.1"


@gated(1)
async def test_clients_are_told_apart(c, s, gate, a):
    event = c.submit(wait_for, "here", ctx=LLM)
    await poll(lambda: len(gate.state.placed) == 1, 10)
    async with Client(s.address, asynchronous=True) as other:
        more = other.map(use, range(3), ctx=LLM)
        await poll(lambda: len(gate.parked.asked) == 4, 10)
        assert {asked.client for asked in gate.parked.asked.values()} == {c.id, other.id}
        await Event("here").set()
        await other.gather(more)
    await event


def test_why(tmp_path):
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        future = client.submit(abs, 1)
        assert "call dask_pcm.install(client) first" in pcm.explain(future)
        future.result()
        pcm.install(client)
        held = [client.submit(wait_for, f"open{i}", ctx=LLM) for i in range(2)]
        waiting = client.submit(use, 2, ctx=LLM, key="the-third")
        try:
            client.sync(poll, lambda: "'the-third' waits" in _gate(cluster, "the-third"), 10)
            client.sync(poll, lambda: "is assigned to" in _gate(cluster, held[0].key), 10)
            assert "1 worker: warm, busy for" in pcm.explain("the-third")
            text = pcm.explain(held[0])
            assert "is assigned to" in text and ": warm, with room" in text
        finally:
            Event("open0").set(), Event("open1").set()
        assert waiting.result() == (2, "llm")
        assert ": warm, with room" in pcm.explain(waiting)
        assert "is not at the gate" in pcm.explain("nobody")


def _gate(cluster, key):
    return cluster.scheduler.plugins["pcm-gate"].hub.explain(key)


def test_why_a_unit_of_a_run(tmp_path):
    import pandas as pd

    pd.DataFrame({"id": range(30)}).to_parquet(tmp_path / "in.parquet")
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        frame = pcm.read_parquet(tmp_path / "in.parquet")
        job = pcm.map_partitions(
            lambda frame, llm: frame, frame, context=LLM, meta={"id": "i8"}, batch_rows=30
        )
        pcm.write_parquet(job, tmp_path / "out", progress=False)
        (part,) = [p.name for p in (tmp_path / "out").glob("part-*-000000000030.parquet")]
        state = cluster.scheduler.plugins["pcm-gate"].state
        keys = [getattr(d.action, "key", None) for d in state.plans.decisions]
        (key,) = [key for key in keys if key]
        assert key.endswith(part.removesuffix(".parquet"))
        assert "(30 rows)" in pcm.explain(key)
        assert "(30 rows)" in pcm.explain(part)


def read(path):
    return Path(path).read_text()


def test_the_gate_learns_what_staging_takes(tmp_path):
    (tmp_path / "weights").write_text("w" * 1000)
    path = str(tmp_path / "weights")

    @gated(1)
    async def on_cluster(c, s, gate, a):
        context = pcm.Context(read, path, files=[path])
        await c.submit(use, 1, ctx=context)
        assert gate.state.contexts.file_bytes[context.digest] == 1000
        assert gate.state.estimates.cost.stages[context.digest].value > 0
        assert gate.state.contexts.staged_on[context.digest] == {"127.0.0.1"}

    on_cluster()
