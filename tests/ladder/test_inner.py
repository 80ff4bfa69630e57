"""Contexts whose loaders acquire others; waiting for room; what arrives while something loads."""

from __future__ import annotations

import threading

import pytest
import torch

import dask_pcm as pcm
from dask_pcm.context.context import Context
from dask_pcm.errors import LoadError
from dask_pcm.ladder.objects.host import Host
from dask_pcm.ladder.store import Store
from dask_pcm.tiers import Tier
from tests.ladder.objects.test_images import keeper
from tests.support.patience import patient

MIB = 1 << 20


def load(number, mib=4):
    module = torch.nn.Linear(1024, mib << 8, bias=False)
    torch.nn.init.constant_(module.weight, number)
    return module


class Pipe:
    def __init__(self, module):
        self.parts = {"enc": [module]}


def load_pipe(inner):
    with pcm.acquire(inner) as module:
        return Pipe(module)


#: Loaders are pickled; they find these again by their module's name.
BEGUN, GO_ON, MADE = threading.Event(), threading.Event(), []


def slow():
    BEGUN.set()
    assert GO_ON.wait(patient(30))
    return load(1)


def noted():
    MADE.append(1)
    return load(1)


@pytest.fixture
def store(monkeypatch):
    store = Store(budget=lambda: 6 * MIB, is_mapped=False)
    monkeypatch.setattr("dask_pcm.plugins.worker.task.of_process", lambda: store)
    yield store
    store.validate()


def ask(store, context):
    with store.acquire([context.ref]) as (value,):
        module = value.parts["enc"][0] if isinstance(value, Pipe) else value
        return float(module.weight.detach()[-1, -1])


def test_what_an_object_is_made_of_stays_for_as_long_as_it_does(store):
    inner, other = Context(load, 1), Context(load, 2)
    pipe = Context(load_pipe, inner)
    assert ask(store, pipe) == 1
    assert not store.offload(inner.digest)
    assert store.tier(inner.digest) is Tier.DEVICE
    assert ask(store, other) == 2  # both have made room for it
    assert (store.tier(pipe.digest), store.tier(inner.digest)) == (
        Tier.ABSENT,
        Tier.HOST,
    )
    assert ask(store, pipe) == 1


def test_a_loader_that_fails_lets_go_of_what_it_has_acquired(store):
    inner = Context(load, 1)

    def fail(inner):
        with pcm.acquire(inner) as found:
            if found is not None:
                raise ValueError("no")
        return found

    with pytest.raises(LoadError):
        store.load(Context(fail, inner).ref)
    assert store.offload(inner.digest)


def test_who_holds_nothing_waits_for_as_long_as_others_work(store):
    """Two tasks, each with what the other has no room beside; nobody looks at a clock."""
    one, two = Context(load, 1), Context(load, 2)
    answers = []
    with store.acquire([one.ref]):
        thread = threading.Thread(target=lambda: answers.append(ask(store, two)))
        thread.start()
        thread.join(1.5)
        assert thread.is_alive()
    thread.join(30)
    assert answers == [2]


def test_of_two_that_wait_for_each_other_one_is_told(store):
    refs = [Context(load, number, 3).ref for number in range(4)]
    has_taken = threading.Barrier(2, timeout=patient(30))
    errors = []

    def task(first, second):
        with store.acquire([first]):
            has_taken.wait()
            try:
                with store.acquire([second]):
                    pass
            except LoadError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=task, args=refs[n : n + 2]) for n in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert 1 <= len(errors) <= 2
    assert "wait for room as well" in errors[0]


def test_measured_larger_than_there_is_room_it_does_not_stay(store):
    """Its size was not known, and somebody holds on to what is there."""
    one, two = Context(load, 1), Context(load, 2)
    with store.acquire([one.ref]):
        with pytest.raises(LoadError):
            store.load(two.ref)
        assert store.tier(two.digest) in (Tier.HOST, Tier.ABSENT)
        store.validate()
    assert ask(store, two) == 2
    assert ask(store, one) == 1


def test_released_while_it_loads_it_does_not_stay():
    store = Store()
    context = Context(slow)
    thread = threading.Thread(target=store.load, args=[context.ref])
    thread.start()
    assert BEGUN.wait(patient(30))
    store.release(context.digest)
    GO_ON.set()
    thread.join(30)
    assert store.tier(context.digest) is Tier.ABSENT


def test_what_a_task_changes_while_the_image_is_written_is_not_what_others_find():
    shelf = keeper()
    store = Store(host=Host(shelf), budget=lambda: 64 * MIB, is_mapped=False)
    context = Context(load, 1, 16)

    class Meddling(Host):
        def put(self, digest, name, frozen):
            with torch.no_grad():
                store._residencies.by_digest[digest].value.weight.add_(100)
            return super().put(digest, name, frozen)

    store._loads._builder._host = store._residencies._host = Meddling(shelf)
    store.load(context.ref)
    assert shelf.find(context.digest) is None
    assert ask(store, context) == 101
    assert store.offload(context.digest) and ask(store, context) == 101


def test_without_reattaching_an_image_is_not_looked_for():
    shelf = keeper()
    kept, anew = Context(noted), Context(noted, reattach=False)
    assert kept.digest == anew.digest
    first = Store(host=Host(shelf), budget=lambda: 64 * MIB, is_mapped=False)
    first.load(kept.ref)
    assert shelf.find(kept.digest)
    again = Store(host=Host(shelf), budget=lambda: 64 * MIB, is_mapped=False)
    again.load(anew.ref)
    assert len(MADE) == 2


def test_an_object_that_holds_itself_is_loaded():
    def cyclic():
        value = {"module": load(1)}
        value["self"] = value
        return value

    store = Store(budget=lambda: 6 * MIB, is_mapped=False)
    context = Context(cyclic)
    store.load(context.ref)
    assert store.offload(context.digest)
