"""Workers, hosts, resources and priorities that users ask for."""

from __future__ import annotations

import asyncio

import pytest
from distributed import wait

from dask_pcm import Context
from dask_pcm.errors import LoadError
from dask_pcm.plugins.worker.plugin import CONTEXTS
from tests.support.gate_tasks import (
    DONE,
    A,
    B,
    is_warm,
    noted,
    numbers,
    where,
    work,
)
from tests.support.gated import gated, poll


@gated(3)
async def test_users_workers_and_loose_restrictions(c, s, gate, a, b, d):
    only = c.map(numbers, range(10), ctx=A, key="w", workers=[b.address])
    await wait(only)
    assert await where(c, only) == {b.address}
    assert s.workers[b.address] and not is_warm(a)
    loose = c.map(
        numbers, range(4), ctx=A, key="l", workers=["tcp://127.0.0.1:1"], allow_other_workers=True
    )
    await wait(loose)
    assert {f.status for f in loose} == {"finished"}


@gated([("127.0.0.1", 1), ("127.0.0.2", 1)])
async def test_users_hosts(c, s, gate, a, b):
    futures = c.map(numbers, range(10), ctx=A, workers=["127.0.0.2"])
    await wait(futures)
    assert await where(c, futures) == {b.address}
    assert not is_warm(a)


@gated()
async def test_a_loose_restriction_outlives_its_worker(c, s, gate, a, b):
    futures = c.map(
        work, range(6), ctx=A, seconds=0.1, workers=[a.address], allow_other_workers=True
    )
    await poll(lambda: any(f.status == "finished" for f in futures), 10)
    await a.close()
    assert await asyncio.wait_for(c.gather(futures), 20) == [(i, "a") for i in range(6)]


@gated(1, is_held=True)
async def test_a_host_restriction_does_not_bypass_the_gate(c, s, gate, a):
    futures = c.map(numbers, range(4), ctx=A, workers=["127.0.0.1"])
    loose = c.map(numbers, range(4), ctx=A, key="l", workers=[a.address], allow_other_workers=True)
    await poll(lambda: len(gate.state.ahead.waiting) == 8, 5)
    assert {f.status for f in futures + loose} == {"pending"}
    gate.release()
    await wait(futures + loose)


@gated([("127.0.0.1", 1, {"resources": {"GPU": 1}}), ("127.0.0.1", 1)])
async def test_resources(c, s, gate, a, b):
    futures = c.map(numbers, range(6), ctx=A, resources={"GPU": 1})
    await wait(futures)
    assert await where(c, futures) == {a.address}


@gated(1)
async def test_restricted_work_finds_a_worker_that_joins_later(c, s, gate, a):
    from distributed import Worker

    future = c.submit(numbers, 1, ctx=A, resources={"GPU": 1})
    await poll(lambda: len(gate.state.ahead.waiting) == 1, 5)
    async with Worker(s.address, resources={"GPU": 1}) as late:
        assert await future == 1
        assert await where(c, [future]) == {late.address}


@gated(1, is_held=True)
async def test_priorities(c, s, gate, a):
    low = c.map(noted, range(4), ctx=A, key="low")
    await poll(lambda: len(gate.state.ahead.waiting) == 4, 5)
    high = c.map(noted, range(4, 8), ctx=A, key="high", priority=10)
    await poll(lambda: len(gate.state.ahead.waiting) == 8, 5)
    gate.release()
    await wait(low + high)
    assert set(DONE[:4]) == {4, 5, 6, 7}


@gated(1, is_held=True)
async def test_priorities_across_contexts(c, s, gate, a):
    for context in (A, B):
        await asyncio.to_thread(a.plugins[CONTEXTS].contexts.store.load, context.ref)
    await poll(lambda: gate.state.workers[a.address].holds((A.digest, B.digest)), 5)
    low = c.map(noted, range(6), ctx=A, key="low")
    await poll(lambda: len(gate.state.ahead.waiting) == 6, 5)
    high = c.map(noted, range(10, 14), ctx=B, key="high", priority=10)
    middle = c.map(noted, range(20, 24), ctx=A, key="middle", priority=5)
    await poll(lambda: len(gate.state.ahead.waiting) == 14, 5)
    gate.release()
    await wait(low + high + middle)
    ranks = [2 if i < 10 else 0 if i < 20 else 1 for i in DONE]
    # Those on the lanes at the same moment end in any order.
    before = {at: ranks[: max(0, at + 1 - gate.hub.config.n_lanes)] for at in range(len(ranks))}
    assert all(max(before[at], default=0) <= rank for at, rank in enumerate(ranks))


@gated()
async def test_a_load_that_fails_ends_the_tasks_with_the_users_traceback(c, s, gate, a, b):
    def broken():
        raise OSError("weights are gone")

    futures = c.map(numbers, range(3), ctx=Context(broken))
    with pytest.raises(LoadError, match=r"(?s)in broken.*OSError: weights are gone"):
        await c.gather(futures)
    assert await c.submit(numbers, 1, ctx=A) == 1
