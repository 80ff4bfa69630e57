"""A worker that ends while tasks of it still run: nothing is loaded for nobody."""

from __future__ import annotations

import threading

import pytest
from distributed.utils_test import captured_logger

import dask_pcm as pcm
from tests.support.gated import gated, poll

LOADED, SAID = [], []
BEGUN, GO = threading.Event(), threading.Event()


def load(name="model"):
    LOADED.append(name)
    return name


@pytest.fixture(autouse=True)
def anew():
    for each in (LOADED, SAID, BEGUN, GO):
        each.clear()
    yield
    GO.set()


def outlive(i, model):
    """Batches of a unit, on a thread that Dask does not wait for."""
    with pcm.acquire(model):
        BEGUN.set()
        assert GO.wait(30)
    try:
        with pcm.acquire(model):
            SAID.append("another batch")
    except Exception as error:
        SAID.append(type(error).__name__)


@gated(nthreads=1)
async def test_a_task_that_outlives_its_worker_loads_nothing(c, s, gate, a):
    task = c.submit(outlive, 1, model=pcm.Context(load))
    await poll(BEGUN.is_set, 20)
    with captured_logger("distributed.worker") as log:
        await a.close(executor_wait=False)
        GO.set()
        await poll(lambda: bool(SAID), 20)
    assert (SAID, LOADED) == (["Reschedule"], ["model"])
    assert "not installed" not in log.getvalue()
    await task.cancel()


@gated(nthreads=1)
async def test_nor_does_one_that_waits_for_its_turn(c, s, gate, a):
    model = pcm.Context(load)  # one holder at a time
    first = c.submit(outlive, 1, model=model)
    await poll(BEGUN.is_set, 20)
    second = c.submit(outlive, 2, model=model)
    await poll(lambda: len(a.state.executing) + len(a.state.long_running) == 2, 20)
    await a.close(executor_wait=False)
    GO.set()
    await poll(lambda: bool(SAID), 20)
    assert (set(SAID), LOADED) == ({"Reschedule"}, ["model"])
    await c.cancel([first, second])


def test_a_store_that_has_ended_loads_nothing():
    from dask_pcm.ladder.store import Store

    store, model = Store(), pcm.Context(load)
    assert store.load(model.ref) == "model"
    store.end()
    assert store.load(model.ref) == "model"  # what is there may be used to the end
    store.close()
    with pytest.raises(pcm.errors.LoadError, match="this process is ending"):
        store.load(model.ref)
    assert LOADED == ["model"]
