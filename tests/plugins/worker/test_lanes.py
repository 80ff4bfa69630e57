"""Lanes beside a worker's threads, in Dask's own state machine of a worker."""

from __future__ import annotations

import random

import pytest
from distributed import Event, wait
from distributed.collections import HeapSet
from distributed.utils_test import inc
from distributed.worker_state_machine import TaskState, WorkerState

import dask_pcm as pcm
from dask_pcm.plugins.worker.lanes import LANES, Startable
from dask_pcm.plugins.worker.plugin import CONTEXTS
from tests.support.gated import gated, poll


def load():
    return "live"


A = pcm.Context(load)


def tasks(n=40):
    """Tasks of both kinds, in no order."""
    made = [TaskState(key=f"t-{i}", run_id=0, priority=(0, i)) for i in range(n)]
    for ts in random.Random(7).sample(made, n // 2):
        ts.annotations = {"executor": LANES}
    return random.Random(8).sample(made, n)


def test_what_is_startable_has_all_that_a_heap_set_has():
    assert {name for name in vars(HeapSet) if not name.startswith("_")} <= set(dir(Startable))
    made = tasks()
    queue, heap = Startable(made, 2), HeapSet(key=Startable.key)
    for ts in made:
        heap.add(ts)
    assert str(queue) == "<Startable: 40 items>" and len(queue) == 40 and set(queue) == set(heap)
    while heap:
        assert queue and queue.peek() is heap.peek()
        assert list(queue.sorted()) == list(heap.sorted())
        assert list(queue.peekn(3)) == list(heap.peekn(3)) and not list(queue.peekn(-1))
        right = queue.peekright()
        assert right.priority >= queue.peek().priority
        assert queue.popright() is right and right not in queue
        heap.discard(right)
        if heap:
            assert queue.pop() is heap.pop()
    assert not queue
    for take in (queue.peek, queue.pop, queue.peekright, queue.popright):
        with pytest.raises(KeyError):
            take()
    queue.add(made[0])
    queue.clear()
    assert not queue and made[0] not in queue


@pytest.mark.parametrize("is_lane", [True, False])
def test_what_is_startable_is_true_wherever_it_has_something(is_lane):
    queue = Startable([], 2)
    (ts,) = tasks(1)
    ts.annotations = {"executor": LANES} if is_lane else {}
    assert not queue
    queue.add(ts)
    assert queue and list(queue) == [ts]
    ts.annotations = {}  # wherever it was put, it is found
    queue.discard(ts)
    assert not queue


def until(i, name, ctx=None):
    assert Event(name).wait(30)
    return i


@gated([("127.0.0.1", 3)])
async def test_the_number_of_threads_stays_what_the_user_has_set(c, s, gate, a):
    threads, lanes = a.state.nthreads, gate.hub.config.n_lanes
    assert threads == 3 and "/3," in repr(a) and a.identity()["nthreads"] == 3
    plain = c.map(until, range(9), name="go")
    context = c.map(until, range(9), name="go", ctx=A)
    await poll(lambda: len(a.state.executing) == threads + lanes, 10)
    await poll(lambda: len(a.state.ready) >= 1, 10)
    assert a.state.ready and a.state.nthreads == 3
    assert sum(f.key in {ts.key for ts in a.state.executing} for f in plain) == threads
    await Event("go").set()
    assert await c.gather([*plain, *context]) == [*range(9), *range(9)]


@gated(1)
async def test_resources_are_given_by_priority_to_both_kinds(c, s, gate, a):
    await a.set_resources(slot=1)
    first = c.submit(until, 0, "go", resources={"slot": 1})
    await poll(lambda: len(a.state.executing) == 1, 10)
    late = c.map(inc, range(3), resources={"slot": 1}, priority=-1)
    await poll(lambda: len(a.state.constrained) == 3, 10)
    urgent = c.submit(until, 1, "later", ctx=A, resources={"slot": 1}, priority=9)
    await poll(lambda: len(a.state.constrained) == 4, 10)
    await Event("go").set()
    await wait(first)
    await poll(lambda: urgent.key in {ts.key for ts in a.state.executing}, 10)
    assert not any(future.done() for future in late)
    await Event("later").set()
    assert await c.gather([first, urgent, *late]) == [0, 1, 1, 2, 3]


@gated(1)
async def test_without_the_toolkit_dasks_own_step_is_back(c, s, gate, a):
    blocked = c.map(until, range(4), name="go", ctx=A)
    await poll(lambda: len(a.state.executing) == gate.hub.config.n_lanes, 10)
    plain = c.map(until, range(4), name="go")
    await poll(lambda: len(a.state.executing) == gate.hub.config.n_lanes + 1, 10)
    gate.uninstall()
    await c.unregister_worker_plugin(CONTEXTS)
    assert type(a.state.ready) is type(a.state.constrained) is HeapSet
    assert type(a.state) is WorkerState and a.state.nthreads == 1
    await Event("go").set()
    assert await c.gather([*blocked, *plain]) == [*range(4), *range(4)]
