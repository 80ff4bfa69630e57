"""The scheduler plugin under what Dask and its users do, scheduler validation on."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import dask
from distributed import Event, wait, worker_client
from distributed.core import Status
from distributed.utils_test import inc

from dask_pcm.plugins.scheduler.plugin import GATE, GatePlugin
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.plugins.worker.task import hold
from tests.support.gate_tasks import (
    DONE,
    A,
    begun,
    busy,
    is_warm,
    noted,
    plus,
    until_set,
    where,
    work,
)
from tests.support.gated import gated, install, poll
from tests.support.patience import patient


@gated()
async def test_tasks_run_on_the_lanes_and_plain_ones_on_their_own_threads(c, s, gate, a, b):
    def thread(ctx=None):
        return threading.current_thread().name

    assert "pcm-lane" in await c.submit(thread, ctx=A)
    assert "Default" in await c.submit(thread)


@gated(1)
async def test_plain_tasks_keep_to_their_threads(c, s, gate, a):
    """The worker may do more at once, but plain tasks of a one-thread worker stay one by one."""
    await wait(c.map(busy, range(12)))
    assert [step for i in DONE[::2] for step in (i, i)] == DONE


@gated()
async def test_plain_tasks_do_not_wait_for_context_work(c, s, gate, a, b):
    """However much of it is in a worker's hands."""
    gate.hub.config = dataclasses.replace(gate.hub.config, pipeline_s=60.0)
    await c.gather(c.map(plus, range(50), ctx=A, key="x"))  # so short that many are sent ahead
    blocked = c.map(until_set, ["go"] * 200, range(200), ctx=A, key="x")
    await poll(lambda: all(len(w.state.ready) > 4 for w in (a, b)), 10)
    assert await c.gather(c.map(inc, range(100))) == list(range(1, 101))
    assert all(ws.long_running == ws.processing for ws in s.workers.values())
    assert not any(future.done() for future in blocked)
    await Event("go").set()
    assert await c.gather(blocked) == list(range(200))


@gated(1)
async def test_context_work_does_not_wait_for_plain_tasks(c, s, gate, a):
    blocked = c.map(until_set, ["go"] * 20, range(20))
    constrained = c.map(until_set, ["go"] * 20, range(20, 40), resources={"slot": 1})
    await a.set_resources(slot=20)
    await poll(lambda: len(a.state.executing) == 1 and len(a.state.constrained) >= 19, 10)
    assert await c.gather(c.map(plus, range(20), ctx=A)) == list(range(1, 21))
    assert len(a.state.executing) == 1 and not any(f.done() for f in [*blocked, *constrained])
    await Event("go").set()
    assert await c.gather(blocked + constrained) == list(range(40))


@gated(1)
async def test_context_tasks_that_wait_for_context_tasks(c, s, gate, a):
    """Each leaves its lane to what it waits for, however many there are."""

    def outer(i, ctx=None):
        with worker_client() as client:
            return sum(client.gather(client.map(plus, [10 * i, 10 * i + 1], ctx=ctx)))

    found = await asyncio.wait_for(c.gather(c.map(outer, range(6), ctx=A)), 30)
    assert found == [20 * i + 3 for i in range(6)]
    await poll(lambda: not gate.state.placed, 10)


@gated(1)
async def test_a_context_task_that_secedes(c, s, gate, a):
    def seceding(i, ctx=None):
        from distributed import secede, worker_client

        secede()
        with worker_client() as client:
            return client.submit(inc, i).result()

    assert await c.gather(c.map(seceding, range(4), ctx=A)) == [1, 2, 3, 4]


@gated(1)
async def test_one_lane_reads_while_the_other_infers(c, s, gate, a):
    inferring, read = Event("inferring"), Event("read")

    def unit(i, ctx=None):
        if i == 1:
            Event("read").set()
        with hold([ctx.ref]):
            if i == 0:
                Event("inferring").set()
                assert Event("read").wait(patient(10))
        return i

    futures = c.map(unit, range(2), ctx=A)
    assert await c.gather(futures) == [0, 1]
    assert await inferring.is_set() and await read.is_set()


@gated()
async def test_registering_twice_keeps_the_gate_and_the_contexts(c, s, gate, a, b):
    await wait(c.map(work, range(6), ctx=A))
    await install(c)
    assert s.plugins[GATE] is gate
    await wait(c.map(work, range(6, 12), ctx=A))
    assert [is_warm(a), is_warm(b)] == [1, 1]


@gated(config={"distributed.worker.memory.pause": False})
async def test_a_paused_worker_gets_nothing_new(c, s, gate, a, b):
    await wait(c.map(work, range(8), ctx=A, seconds=0.01))
    a.status = Status.paused
    await poll(lambda: gate.state.workers[a.address].is_paused, 5)
    futures = c.map(work, range(8, 16), ctx=A)
    await wait(futures, timeout=patient(10))
    assert await where(c, futures) == {b.address}
    a.status = Status.running
    await poll(lambda: not gate.state.workers[a.address].is_paused, 5)


@gated(config={"distributed.worker.memory.pause": False})
async def test_what_a_paused_worker_has_not_begun_goes_elsewhere(c, s, gate, a, b):
    gate.hub.config = dataclasses.replace(gate.hub.config, pipeline_s=60.0)
    await wait(c.map(noted, range(-40, 0), ctx=A, key="x"))  # so short that many are sent ahead
    DONE.clear()
    futures = c.map(begun, range(12), ctx=A, key="x")
    n_begun = 2 * gate.hub.config.n_lanes
    await poll(lambda: len(DONE) == n_begun, 10)
    sent = [key for key, where in gate.state.placed.items() if where == a.address]
    a.status = Status.paused
    n_kept = gate.hub.config.n_lanes
    await poll(lambda: len(gate.state.workers[a.address].running) == n_kept, 10)
    assert len(DONE) == n_begun and len(sent) > n_kept
    await Event("go").set()
    assert await asyncio.wait_for(c.gather(futures), 20) == list(range(12))
    assert sorted(DONE) == list(range(12))  # nothing twice


@gated()
async def test_what_an_earlier_life_of_a_worker_says_is_ignored(c, s, gate, a, b):
    before = dict(gate.state.workers[a.address].tiers)
    s.stream_handlers["pcm-residency"](
        worker=a.address, epoch="before", digest=A.digest, tier="device", seconds=1, error=None
    )
    assert gate.state.workers[a.address].tiers == before


@gated()
async def test_uninstalled_workers_get_no_context_work(c, s, gate, a, b):
    from distributed import Worker

    await wait(c.map(work, range(4), ctx=A))
    s.worker_plugins.pop(CONTEXTS)
    async with Worker(s.address) as plain:
        futures = c.map(work, range(4, 10), ctx=A)
        await wait(futures)
        assert plain.address not in await where(c, futures)


@gated()
async def test_delayed_with_a_context(c, s, gate, a, b):
    value = dask.delayed(work)(1, dask.delayed(A))
    with dask.config.set(scheduler=None):
        assert await c.compute(value) == (1, "a")


def test_the_plugin_pickles():
    import pickle

    assert pickle.loads(pickle.dumps(GatePlugin())).name == GATE
