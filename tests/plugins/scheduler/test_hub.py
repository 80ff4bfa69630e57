"""What observers of the gate see."""

from __future__ import annotations

import logging

import dask_pcm as pcm
from dask_pcm.plugins.worker.task import hold
from dask_pcm.scheduling.actions import Assign
from dask_pcm.scheduling.events import WorkEnded, WorkParked
from tests.support.gated import gated

LLM = pcm.Context(lambda: "llm", name="llm")
N_TASKS = 8


def use(i, ctx=None):
    with hold([ctx.ref]) as (value,):
        return i, value


class Record:
    """Notes all that an observer sees."""

    def __init__(self):
        self.seen = []

    def on_event(self, event, now):
        self.seen.append((now, event))

    def on_action(self, action, now):
        self.seen.append((now, action))

    def of(self, kind, key):
        """The positions among all that was seen of one kind, about one key."""
        return [i for i, (_, x) in enumerate(self.seen) if type(x) is kind and _key(x) == key]


def _key(seen):
    return seen.work.key if isinstance(seen, WorkParked) else seen.key


class Broken(Record):
    def on_event(self, event, now):
        raise ValueError("cannot look")

    on_action = on_event


@gated()
async def test_an_observer_sees_every_event_and_action_in_order(c, s, gate, a, b):
    record = Record()
    gate.hub.observers.append(record)
    futures = c.map(use, range(N_TASKS), ctx=LLM)
    await c.gather(futures)
    for future in futures:
        (parked,) = record.of(WorkParked, future.key)
        (assigned,) = record.of(Assign, future.key)
        (ended,) = record.of(WorkEnded, future.key)
        assert parked < assigned < ended
    times = [now for now, _ in record.seen]
    assert times == sorted(times)


def test_an_observer_that_fails_costs_nothing(caplog):
    @gated()
    async def on_cluster(c, s, gate, a, b):
        record = Record()
        gate.hub.observers += [Broken(), record]
        futures = c.map(use, range(N_TASKS), ctx=LLM)
        assert await c.gather(futures) == [(i, "llm") for i in range(N_TASKS)]
        assert all(record.of(WorkEnded, future.key) for future in futures)

    with caplog.at_level(logging.CRITICAL, logger="dask_pcm"):
        on_cluster()
