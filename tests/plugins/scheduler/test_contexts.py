"""Contexts on a cluster: loaded, shared, failing to load, released."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import dask
import pytest
from distributed import Client, Event, wait

from dask_pcm import Context
from dask_pcm.errors import DeviceBusyError, LoadError
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.plugins.worker.task import hold
from dask_pcm.tiers import Tier
from tests.support.gate_tasks import (
    DONE,
    A,
    B,
    closing,
    fails_at_first,
    is_warm,
    load,
    numbers,
    work,
)
from tests.support.gated import gated, poll
from tests.support.patience import patient


@gated()
async def test_loads_once_a_worker_and_runs_where_it_is_warm(c, s, gate, a, b):
    futures = c.map(work, range(20), ctx=A)
    assert await c.gather(futures) == [(i, "a") for i in range(20)]
    assert [is_warm(a), is_warm(b)] == [1, 1]
    assert sum(loads.n for loads in gate.contexts.loads.values()) == 2
    more = c.map(work, range(20, 40), ctx=A)
    await wait(more)
    assert [is_warm(a), is_warm(b)] == [1, 1]


@gated()
async def test_a_second_client_finds_it_warm(c, s, gate, a, b):
    await wait(c.map(work, range(8), ctx=A))
    async with Client(s.address, asynchronous=True) as other:
        await other.gather(other.map(work, range(8), ctx=Context(load, "a", name="mine")))
    assert [is_warm(a), is_warm(b)] == [1, 1]


@gated()
async def test_two_contexts_in_one_graph(c, s, gate, a, b):
    first = c.map(work, range(6), ctx=A, key="first")
    second = c.map(work, range(6), ctx=B, key="second")
    assert {name for _, name in await c.gather(first)} == {"a"}
    assert {name for _, name in await c.gather(second)} == {"b"}


@gated()
async def test_whatever_goes_wrong_around_a_load_is_answered(c, s, gate, a, b):
    def broken(*args):
        raise OSError("not the loader's fault")

    for worker in (a, b):
        worker.plugins[CONTEXTS].memory.growing = broken
    with pytest.raises(LoadError, match="not the loader's fault"):
        await asyncio.wait_for(c.submit(numbers, 1, ctx=Context(load, "elsewhere")), 20)


@gated()
async def test_a_load_that_fails_on_one_worker_is_tried_on_another(c, s, gate, a, b):
    future = c.submit(work, 1, ctx=Context(fails_at_first))
    assert await future == (1, "second")
    assert DONE == ["tried", "tried"]


@gated()
async def test_a_task_that_raises_costs_no_context(c, s, gate, a, b):
    def fails(ctx=None):
        with hold([ctx.ref]):
            raise ZeroDivisionError

    futures = c.map(lambda i, ctx: fails(ctx), range(4), ctx=A)
    await wait(futures)
    assert {f.status for f in futures} == {"error"}
    await wait(c.map(work, range(4), ctx=A))
    assert is_warm(a) + is_warm(b) <= 2 and max(is_warm(a), is_warm(b)) == 1


@gated()
async def test_loading_and_wanted_workers_are_not_scaled_down(c, s, gate, a, b):
    def slow_load():
        time.sleep(0.5)
        return "model"

    futures = c.map(numbers, range(4), ctx=Context(slow_load))
    await poll(lambda: any(view.loading_since for view in gate.state.workers.values()), 5)
    loading = [w for w, view in gate.state.workers.items() if view.loading_since]
    kept = gate.valid_workers_downscaling(s, list(s.workers.values()))
    assert not {ws.address for ws in kept} & set(loading)
    await wait(futures)
    assert len(gate.valid_workers_downscaling(s, list(s.workers.values()))) == 2


@gated()
async def test_recipes_are_kept_for_as_long_as_somebody_asks(c, s, gate, a, b):
    """They may hold much; a scheduler lives for weeks."""
    for number in range(5):
        many = c.map(numbers, range(3), ctx=Context(load, f"model {number}"))
        other = c.submit(numbers, 1, ctx=Context(load, "model 0"))
        assert await c.gather(many) == [0, 1, 2]
        assert 1 <= len(gate.contexts.refs) <= 2
        del many
        await wait(other)
    del other
    await poll(lambda: not s.tasks and not len(gate.contexts.refs), 5)
    with dask.annotate(priority=1):
        assert await c.submit(numbers, 1, ctx=Context(load, "model 0")) == 1


@gated()
async def test_released_it_leaves_every_worker_and_is_loaded_again_when_wanted(c, s, gate, a, b):
    model = closing("released")
    await c.gather(c.map(work, range(8), ctx=model, seconds=0.05))
    assert await gate.contexts.on_release([model.digest]) == 2
    workers = gate.state.workers.values()
    await poll(lambda: all(w.tiers.get(model.digest) is not Tier.DEVICE for w in workers), 5)
    assert await Event("closed released").is_set()
    assert not any(w.plugins[CONTEXTS].memory._taken for w in (a, b))
    assert await c.submit(work, 1, ctx=model) == (1, "released")


@gated(1)
async def test_released_in_use_it_stays_until_it_is_let_go(c, s, gate, a):
    model = closing("in use")

    def using(i, ctx=None):
        with hold([ctx.ref]) as (live,):
            Event("using").set()
            assert Event("go").wait(patient(20))
            return live[0]

    future = c.submit(using, 1, ctx=model)
    await Event("using").wait(patient(10))
    await gate.contexts.on_release([model.digest])
    await asyncio.sleep(0.2)
    assert not await Event("closed in use").is_set()
    await Event("go").set()
    assert await future == "in use"
    await asyncio.wait_for(Event("closed in use").wait(), 10)


@gated()
async def test_unused_for_long_it_leaves(c, s, gate, a, b):
    model = closing("idle")
    gate.hub.config = dataclasses.replace(gate.hub.config, idle_s=0.6)
    await c.gather(c.map(work, range(8), ctx=model, seconds=0.05))
    for i in range(4):  # used now and then, it stays
        await asyncio.sleep(0.3)
        workers = [a.address]
        assert await c.submit(work, i, ctx=model, workers=workers, pure=False) == (i, "idle")
    assert is_warm(a, model) == 1
    await asyncio.wait_for(Event("closed idle").wait(), 10)
    await poll(
        lambda: not any(w.plugins[CONTEXTS].contexts.store.n_loads(model.digest) for w in (a, b)),
        10,
    )
    assert await c.submit(work, 9, ctx=model) == (9, "idle")


@gated(nthreads=1)
async def test_moved_away_under_a_task_it_goes_through_the_gate_again(c, s, gate, a):
    """Two tasks that hold one context each and wait for room: one begins anew, none fails."""
    store, n_busy = a.plugins[CONTEXTS].contexts.store, 0
    begin_hold = store.begin_hold

    def busy(refs, again):
        nonlocal n_busy
        n_busy += 1
        if n_busy <= 2:
            raise LoadError("no room") from DeviceBusyError("others hold on to it")
        return begin_hold(refs, again)

    store.begin_hold = busy
    assert await c.submit(work, 1, ctx=A) == (1, "a")
    assert n_busy == 3
