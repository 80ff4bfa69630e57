"""Tasks that tests of the gate run, and what they note. Workers find them by this module's name."""

from __future__ import annotations

import time

from distributed import Event, Reschedule

from dask_pcm import Context
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.plugins.worker.task import hold
from tests.support.patience import patient


def load(name="a"):
    return [name]


A, B = Context(load, "a"), Context(load, "b")


#: What tasks did, in order. Tasks are pickled; they find this list again by its module's name.
DONE: list[object] = []


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


def busy(i):
    DONE.append(i)
    time.sleep(0.01)
    DONE.append(i)


def plus(i, ctx=None):
    return i + 1


def until_set(name, i, ctx=None):
    assert Event(name).wait(patient(30))
    return i


def flaky(kind, ctx=None):
    DONE.append(kind)
    if DONE.count(kind) == 1:
        raise {"error": ValueError, "again": Reschedule}[kind]
    return kind


def fails_at_first():
    DONE.append("tried")
    if len(DONE) == 1:
        raise OSError("no memory on this one")
    return ["second"]


def begun(i, ctx=None):
    DONE.append(i)
    Event("go").wait(patient(20))
    return i


def closing(name):
    """A context that notes when it is closed."""
    return Context(load, name, close=lambda live: Event(f"closed {live[0]}").set())
