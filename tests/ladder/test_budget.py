"""Contexts that do not fit on a device together; a budget stands in for its memory."""

from __future__ import annotations

import threading

import pytest
import torch

from dask_pcm.context.context import Context
from dask_pcm.errors import LoadError
from dask_pcm.ladder.build import recipe_of
from dask_pcm.ladder.objects.tensors import is_out_of_memory
from dask_pcm.ladder.store import Store
from dask_pcm.tiers import Tier

MIB = 1 << 20


class Weights(torch.nn.Module):
    def __init__(self, number, size_mib):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.full((size_mib << 18,), float(number)))


def context(number, size_mib=4, is_declared=True, load=Weights, **hooks):
    memory = size_mib * MIB if is_declared else None
    return Context(load, number, size_mib, device_memory=memory, name=f"c{number}", **hooks).ref


def used(store, ref):
    with store.acquire([ref]) as (value,):
        store.validate()
        return value.weights[-1].item()


def tiers(store, *refs):
    return [store.tier(ref.digest) for ref in refs]


@pytest.mark.parametrize("is_declared", [True, False])
def test_the_least_lately_used_goes_down_and_comes_back(store, is_declared):
    one, two, three = (context(number, is_declared=is_declared) for number in (1, 2, 3))
    assert [used(store, ref) for ref in (one, two, one, three)] == [1, 2, 1, 3]
    assert tiers(store, one, two, three) == [
        Tier.DEVICE,
        Tier.HOST,
        Tier.DEVICE,
    ]
    assert used(store, two) == 2
    assert tiers(store, one, two, three) == [
        Tier.HOST,
        Tier.DEVICE,
        Tier.DEVICE,
    ]
    assert [store.n_loads(ref.digest) for ref in (one, two, three)] == [1, 1, 1]


def test_changes_say_what_was_built_what_was_restored_and_what_it_takes(store, changes):
    one, two = context(1, 6), context(2, 6)
    for ref in (one, two, one):
        used(store, ref)
    name = {one.digest: "one", two.digest: "two"}
    found = [(name[c.digest], c.tier.value, c.is_built, c.n_bytes) for c in changes]
    size = 6 * MIB
    assert found == [
        ("one", "loading", False, 0),
        ("one", "device", True, size),
        ("two", "loading", False, 0),
        ("one", "host", False, size),
        ("two", "device", True, size),
        ("one", "loading", False, 0),
        ("two", "host", False, size),
        ("one", "device", False, size),
    ]


def test_what_is_held_stays_and_who_wants_its_place_waits(store, monkeypatch):
    one, two = context(1, 6), context(2, 6)
    store.load(two)
    store.load(one)
    begun, answers = threading.Event(), []

    def want():
        begun.set()
        answers.append(used(store, two))

    with store.acquire([one]) as (value,):
        thread = threading.Thread(target=want)
        thread.start()
        begun.wait()
        thread.join(0.2)
        assert thread.is_alive() and store.tier(one.digest) is Tier.DEVICE
        assert value.weights[0] == 1
        del value
    thread.join(10)
    assert answers == [2.0]
    assert store.tier(one.digest) is Tier.HOST


def test_who_would_wait_for_itself_is_told_who_holds_on_to_what(store):
    one, two = context(1, 6), context(2, 6)
    with store.acquire([one]), pytest.raises(LoadError) as caught:
        store.load(two)
    assert "tasks that hold 'c1' (6,291,456) wait for room as well" in str(caught.value)
    assert "10,485,760" in str(caught.value)
    assert used(store, two) == 2


@pytest.mark.parametrize("is_declared", [True, False])
def test_what_is_larger_than_the_device_is_refused_with_the_numbers(store, is_declared):
    small, large = context(1, 4), context(2, 11, is_declared)
    used(store, small)
    with pytest.raises(LoadError) as caught:
        store.load(large)
    assert "'c2' takes 11,534,336 bytes" in str(caught.value)
    assert "10,485,760" in str(caught.value) and "pcm.ladder.device.budget" in str(caught.value)
    assert store.tier(large.digest) is Tier.FAILED
    assert tiers(store, small) == [Tier.DEVICE]  # nobody had to leave for it


def test_two_loads_at_once_do_not_take_the_same_room(store):
    """Each waits for the other's end, and then has it leave."""
    refs = [context(number, 6) for number in range(4)]
    answers = []
    threads = [
        threading.Thread(target=lambda ref=ref: answers.append(used(store, ref))) for ref in refs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == [0, 1, 2, 3]


def test_what_has_no_way_down_is_closed_and_built_again(store):
    closed = []
    one, two = context(1, 6, load=plain, close=closed.append), context(2, 6)
    store.load(one)
    used(store, two)
    assert store.tier(one.digest) is Tier.ABSENT
    assert recipe_of(one).close.__self__ == [{"number": 1}]
    store.load(one)
    assert store.tier(two.digest) is Tier.HOST


def plain(number, size_mib):
    return {"number": number}


def nested(number, size_mib):
    """Its loader acquires another context, and keeps what that is made of."""
    from dask_pcm.ladder.store import of_process

    with of_process().acquire([INNER[0]]) as (inner,):
        module = Weights(number, size_mib)
        module.inner = inner
    return module


INNER = [None]


def test_what_another_object_is_made_of_is_not_emptied(monkeypatch):
    store = Store(budget=lambda: 10 * MIB, is_mapped=False)
    monkeypatch.setattr("dask_pcm.ladder.store.of_process", lambda: store)
    outer = context(2, 2, load=nested)
    INNER[0] = context(1, 2)
    assert used(store, outer) == 2
    store.offload(INNER[0].digest)
    with store.acquire([outer]) as (module,):
        assert module.inner.weights[0] == 1
    assert used(store, INNER[0]) == 1
    store.validate()


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_for_want_of_memory(error, is_so):
    assert is_out_of_memory(error) is is_so


def test_without_memory_while_loading_idle_contexts_go_down_first():
    """No budget is known; the device says so itself."""
    store = Store(is_mapped=False)
    one, two = context(1), context(2)
    store.load(one)
    store.load(two)
    hungry, other = (context(n, is_declared=False, load=hungry_load) for n in (3, 4))
    ROOM[0] = lambda: store.tier(one.digest) is store.tier(two.digest) is Tier.HOST
    assert used(store, hungry) == 3
    assert used(store, one) == 1
    ROOM[0] = lambda: False
    with pytest.raises(LoadError, match="OutOfMemoryError"):
        store.load(other)
    store.validate()


ROOM = [lambda: True]


def hungry_load(number, size_mib):
    if not ROOM[0]():
        raise torch.OutOfMemoryError("tried to allocate 4.00 GiB")
    return Weights(number, size_mib)
