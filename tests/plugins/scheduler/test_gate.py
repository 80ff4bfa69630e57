"""The scheduler plugin under what Dask and its users do, scheduler validation on."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time

import dask
import pytest
from distributed import Client, Event, Nanny, Reschedule, wait, worker_client
from distributed.core import Status
from distributed.utils_test import inc

from dask_pcm import Context
from dask_pcm.errors import DeviceBusyError, LoadError
from dask_pcm.plugins.scheduler.plugin import GATE, GatePlugin
from dask_pcm.plugins.scheduler.tasks.find_refs import find_refs
from dask_pcm.plugins.scheduler.tasks.parking import PARKED
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.plugins.worker.task import hold
from dask_pcm.tiers import Tier
from tests.support.gated import gated, install, poll
from tests.support.patience import patient


def load(name="a"):
    return [name]


A, B = Context(load, "a"), Context(load, "b")

#: What tasks did, in order. Tasks are pickled; they find this list again by its module's name.
DONE: list[object] = []


@pytest.fixture(autouse=True)
def nothing_done():
    DONE.clear()


def noted(i, ctx=None):
    DONE.append(i)
    return i


def work(i, ctx=None, seconds=0.0):
    with hold([ctx.ref]) as (value,):
        time.sleep(seconds)
        return i, value[0]


def numbers(i, ctx=None):
    return i


def is_warm(worker, context=A):
    return worker.plugins[CONTEXTS].contexts.store.n_loads(context.digest)


async def where(c, futures):
    return {address for found in (await c.who_has(futures)).values() for address in found}


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
async def test_tasks_run_on_the_lanes_and_plain_ones_on_their_own_threads(c, s, gate, a, b):
    def thread(ctx=None):
        return threading.current_thread().name

    assert "pcm-lane" in await c.submit(thread, ctx=A)
    assert "Default" in await c.submit(thread)


def busy(i):
    DONE.append(i)
    time.sleep(0.01)
    DONE.append(i)


@gated(1)
async def test_plain_tasks_keep_to_their_threads(c, s, gate, a):
    """The worker may do more at once, but plain tasks of a one-thread worker stay one by one."""
    await wait(c.map(busy, range(12)))
    assert [step for i in DONE[::2] for step in (i, i)] == DONE


def plus(i, ctx=None):
    return i + 1


def until(name, i, ctx=None):
    assert Event(name).wait(patient(30))
    return i


@gated()
async def test_plain_tasks_do_not_wait_for_context_work(c, s, gate, a, b):
    """However much of it is in a worker's hands."""
    gate.hub.config = dataclasses.replace(gate.hub.config, pipeline_s=60.0)
    await c.gather(c.map(plus, range(50), ctx=A, key="x"))  # so short that many are sent ahead
    blocked = c.map(until, ["go"] * 200, range(200), ctx=A, key="x")
    await poll(lambda: all(len(w.state.ready) > 4 for w in (a, b)), 10)
    assert await c.gather(c.map(inc, range(100))) == list(range(1, 101))
    assert all(ws.long_running == ws.processing for ws in s.workers.values())
    assert not any(future.done() for future in blocked)
    await Event("go").set()
    assert await c.gather(blocked) == list(range(200))


@gated(1)
async def test_context_work_does_not_wait_for_plain_tasks(c, s, gate, a):
    blocked = c.map(until, ["go"] * 20, range(20))
    constrained = c.map(until, ["go"] * 20, range(20, 40), resources={"slot": 1})
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


@gated(is_held=True)
async def test_cancel_while_parked(c, s, gate, a, b):
    futures = c.map(numbers, range(5), ctx=A)
    await poll(lambda: len(s.unrunnable) == 5, 5)
    await c.cancel(futures)
    await poll(lambda: not s.tasks, 5)
    assert not gate.parked.asked and not s.unrunnable and not gate.state.ahead.waiting


@gated(is_held=True)
async def test_disconnect_while_parked(c, s, gate, a, b):
    async with Client(s.address, asynchronous=True) as other:
        other.map(numbers, range(5), ctx=A)
        futures = other.map(numbers, range(5), ctx=A)
        await poll(lambda: len(s.unrunnable) == 5, 5)
        del futures
    await poll(lambda: not s.tasks, 5)
    assert not gate.parked.asked and not gate.state.ahead.waiting


@gated(is_held=True, Worker=Nanny, timeout=60)
async def test_restart_while_parked(c, s, gate, a, b):
    futures = c.map(numbers, range(5), ctx=A)
    await poll(lambda: len(s.unrunnable) == 5, 5)
    await c.restart()
    del futures
    assert not s.tasks and not gate.parked.asked and not s.unrunnable
    gate.release()
    assert await c.gather(c.map(numbers, range(5), ctx=A)) == list(range(5))


@gated(is_held=True)
async def test_a_lost_dependency_of_parked_work(c, s, gate, a, b):
    x = c.submit(inc, 1, key="dep", workers=[a.address], allow_other_workers=True)
    await wait(x)
    y = c.submit(numbers, x, ctx=A, key="parked")
    await poll(lambda: len(s.unrunnable) == 1, 5)
    await a.close(executor_wait=False)
    await poll(lambda: s.tasks["dep"].state == "memory", 5)
    await poll(lambda: s.tasks["parked"].state == "no-worker", 5)
    gate.release()
    assert await y == 2


@gated()
async def test_a_lost_result_goes_through_the_gate_again(c, s, gate, a, b):
    futures = c.map(numbers, range(6), ctx=A, key="x")
    await wait(futures)
    assert all(s.tasks[f.key].worker_restrictions == {PARKED} for f in futures)
    n_before = len(s.transition_log)
    (holder,) = s.tasks[futures[0].key].who_has
    await next(w for w in (a, b) if w.address == holder.address).close(executor_wait=False)
    assert await c.gather(futures) == list(range(6))
    again = [(x[1], x[2]) for x in list(s.transition_log)[n_before:]]
    assert ("released", "waiting") in again
    assert again.count(("no-worker", "processing")) == again.count(("waiting", "no-worker"))


@gated()
async def test_retire_with_work_parked(c, s, gate, a, b):
    futures = c.map(work, range(20), ctx=A, seconds=0.03)
    await poll(lambda: any(f.status == "finished" for f in futures), 10)
    await c.retire_workers([a.address])
    assert await c.gather(futures) == [(i, "a") for i in range(20)]


def flaky(kind, ctx=None):
    DONE.append(kind)
    if DONE.count(kind) == 1:
        raise {"error": ValueError, "again": Reschedule}[kind]
    return kind


@gated()
async def test_retries_park_again(c, s, gate, a, b):
    future = c.submit(flaky, "error", ctx=A, retries=2)
    assert await future == "error"
    steps = [(x[1], x[2]) for x in s.story(future.key)]
    assert steps.count(("no-worker", "processing")) == 2


@gated()
async def test_client_retry_and_reschedule(c, s, gate, a, b):
    failed = c.submit(flaky, "error", ctx=A)
    await wait(failed)
    assert failed.status == "error"
    assert s.tasks[failed.key].worker_restrictions == {PARKED}
    await failed.retry()
    assert await failed == "error"
    assert await c.submit(flaky, "again", ctx=A) == "again"


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


@gated()
async def test_whatever_goes_wrong_around_a_load_is_answered(c, s, gate, a, b):
    def broken(*args):
        raise OSError("not the loader's fault")

    for worker in (a, b):
        worker.plugins[CONTEXTS].memory.growing = broken
    with pytest.raises(LoadError, match="not the loader's fault"):
        await asyncio.wait_for(c.submit(numbers, 1, ctx=Context(load, "elsewhere")), 20)


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


@gated()
async def test_release_while_processing(c, s, gate, a, b):
    futures = c.map(work, range(12), ctx=A, seconds=0.05)
    await poll(lambda: bool(gate.state.placed), 10)
    for future in futures:
        future.release()
    del futures, future
    await poll(lambda: not s.tasks, 10)
    assert not gate.state.placed and not gate.parked.asked
    assert await c.submit(numbers, 1, ctx=A) == 1


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
async def test_actors_are_left_alone(c, s, gate, a, b):
    class Counter:
        def __init__(self, ctx=None):
            self.n = 0

        def add(self):
            self.n += 1
            return self.n

    actor = await c.submit(Counter, ctx=A, actor=True)
    assert await actor.add() == 1


@gated(is_held=True, config={"distributed.scheduler.no-workers-timeout": "200ms"})
async def test_parked_work_does_not_time_out_and_the_unsatisfiable_does(c, s, gate, a, b):
    parked = c.map(numbers, range(3), ctx=A)
    plain = c.submit(inc, 1, resources={"NOPE": 1})
    await wait(plain, timeout=patient(10))
    assert plain.status == "error"
    assert {f.status for f in parked} == {"pending"}
    gate.release()
    assert await c.gather(parked) == [0, 1, 2]


@gated(is_held=True)
async def test_parked_work_keeps_the_scheduler_from_going_idle(c, s, gate, a, b):
    s.idle_timeout = 0.2
    futures = c.map(numbers, range(3), ctx=A)
    await poll(lambda: len(s.unrunnable) == 3, 5)
    assert s.check_idle() is None
    gate.release()
    await wait(futures)


@gated()
async def test_registering_twice_keeps_the_gate_and_the_contexts(c, s, gate, a, b):
    await wait(c.map(work, range(6), ctx=A))
    await install(c)
    assert s.plugins[GATE] is gate
    await wait(c.map(work, range(6, 12), ctx=A))
    assert [is_warm(a), is_warm(b)] == [1, 1]


@gated()
async def test_a_load_that_fails_ends_the_tasks_with_the_users_traceback(c, s, gate, a, b):
    def broken():
        raise OSError("weights are gone")

    futures = c.map(numbers, range(3), ctx=Context(broken))
    with pytest.raises(LoadError, match=r"(?s)in broken.*OSError: weights are gone"):
        await c.gather(futures)
    assert await c.submit(numbers, 1, ctx=A) == 1


def fails_at_first():
    DONE.append("tried")
    if len(DONE) == 1:
        raise OSError("no memory on this one")
    return ["second"]


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


def begun(i, ctx=None):
    DONE.append(i)
    Event("go").wait(patient(20))
    return i


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
async def test_uninstalled_workers_get_no_context_work(c, s, gate, a, b):
    from distributed import Worker

    await wait(c.map(work, range(4), ctx=A))
    s.worker_plugins.pop(CONTEXTS)
    async with Worker(s.address) as plain:
        futures = c.map(work, range(4, 10), ctx=A)
        await wait(futures)
        assert plain.address not in await where(c, futures)


def test_the_walk_finds_refs_and_is_bounded():
    from dask._task_spec import DataNode, Task, TaskRef

    ref = A.ref

    def found(*args, **kwargs):
        return [x.digest for x in find_refs(Task("k", numbers, *args, **kwargs))]

    assert found(1, ctx=A) == found(ref) == found([1, {"x": (ref,)}]) == [A.digest]
    assert [x.digest for x in find_refs(Task("k", functools.partial(numbers, ctx=A)))] == [A.digest]
    assert found(A, B) == sorted([A.digest, B.digest])
    assert found(1, TaskRef("x")) == []
    assert find_refs(DataNode("k", ref)) == ()
    start = time.thread_time()
    assert found(list(range(10**6))) == []
    assert time.thread_time() - start < 0.1  # all of them would take longer


@gated()
async def test_delayed_with_a_context(c, s, gate, a, b):
    value = dask.delayed(work)(1, dask.delayed(A))
    with dask.config.set(scheduler=None):
        assert await c.compute(value) == (1, "a")


@gated(1)
async def test_work_between_ticks_does_not_wait_for_them(c, s, gate, a):
    await wait(c.submit(work, 0, ctx=A))
    gate._ticker.stop()
    start = time.monotonic()
    assert await asyncio.wait_for(c.submit(work, 1, ctx=A), 5)
    assert time.monotonic() - start < 2


def test_the_plugin_pickles():
    import pickle

    assert pickle.loads(pickle.dumps(GatePlugin())).name == GATE


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


def closing(name):
    """A context that notes when it is closed."""
    return Context(load, name, close=lambda live: Event(f"closed {live[0]}").set())


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
    acquire = store.acquire

    def busy(refs, again):
        nonlocal n_busy
        n_busy += 1
        if n_busy <= 2:
            raise LoadError("no room") from DeviceBusyError("others hold on to it")
        return acquire(refs, again)

    store.acquire = busy
    assert await c.submit(work, 1, ctx=A) == (1, "a")
    assert n_busy == 3
