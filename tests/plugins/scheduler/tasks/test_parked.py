"""Parked tasks under cancellation, loss, restart and retry."""

from __future__ import annotations

import asyncio
import time

from distributed import Client, Nanny, wait
from distributed.utils_test import inc

from dask_pcm.plugins.scheduler.tasks.parking import PARKED
from tests.support.gate_tasks import (
    A,
    flaky,
    numbers,
    work,
)
from tests.support.gated import gated, poll
from tests.support.patience import patient


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


@gated(1)
async def test_work_between_ticks_does_not_wait_for_them(c, s, gate, a):
    await wait(c.submit(work, 0, ctx=A))
    gate._ticker.stop()
    start = time.monotonic()
    assert await asyncio.wait_for(c.submit(work, 1, ctx=A), 5)
    assert time.monotonic() - start < 2
