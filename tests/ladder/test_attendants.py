"""What serves a live object: its memory, and when it comes and goes; other tenants of a device."""

from __future__ import annotations

import threading

import pytest

from dask_pcm.errors import LoadError
from dask_pcm.ladder.budget import DeviceBudget, Request
from dask_pcm.ladder.turns import Turns
from dask_pcm.tiers import Tier
from tests.ladder.test_budget import MIB, Weights, context
from tests.support.patience import until

#: What happened to attendants, in order; loaders are pickled, so this is the module's own.
SEEN: list[tuple[str, int]] = []


class Served(Weights):
    """Weights of 4 MiB with an attendant of `pool_mib`."""

    def __init__(self, number, size_mib, pool_mib=2, is_broken=False):
        super().__init__(number, size_mib)
        self.number, self.pool_mib, self.is_broken = number, pool_mib, is_broken

    is_attended = True

    def attend(self):
        return Pool(self)


class Pool:
    n_rows = 7

    def __init__(self, model):
        self.model, self.n_bytes = model, model.pool_mib * MIB
        self.lock = threading.Lock()  # cannot be pickled

    def start(self):
        SEEN.append(("start", self.model.number))
        if self.model.is_broken:
            raise ValueError("no room for pages")

    def close(self):
        # The weights are on the device still.
        SEEN.append(("close", self.model.number if self.model.weights.sum() else -1))


def large(number, size_mib):
    return Served(number, size_mib, pool_mib=20)


def broken(number, size_mib):
    return Served(number, size_mib, is_broken=True)


@pytest.fixture(autouse=True)
def seen():
    SEEN.clear()


def test_its_memory_counts_and_it_leaves_before_its_object(store, changes):
    one, two = context(1, load=Served), context(2, load=Served)
    with store.acquire([one]) as (live,):
        assert store.attendant(one.digest).model is live
        assert [change.n_rows for change in changes] == [0, 7]
        del live  # what is referred to elsewhere is not offloaded
    with store.acquire([two]):  # 6 + 6 MiB with their pools, and 4 + 4 without
        assert store.tier(one.digest) is Tier.HOST and store.attendant(one.digest) is None
    assert SEEN == [("start", 1), ("close", 1), ("start", 2)]
    with store.acquire([one]) as (live,):  # restored, and served again
        assert store.attendant(one.digest).model is live
        del live
    assert store.n_loads(one.digest) == 1
    assert SEEN[3:] == [("close", 2), ("start", 1)]
    store.release(one.digest)
    assert SEEN[5:] == [("close", 1)]


def test_one_that_fits_on_no_device_is_refused_with_the_numbers(store, changes):
    with pytest.raises(LoadError, match=r"'c1' takes 25,165,824 bytes .* has 10,485,760"):
        store.load(context(1, load=large))
    assert SEEN == []
    assert store.load(context(2, 8)).weights[0] == 2  # nothing stays reserved


def test_one_that_does_not_start_is_closed_and_its_error_is_told(store, changes):
    ref = context(1, load=broken)
    with pytest.raises(LoadError, match="no room for pages"):
        store.load(ref)
    assert SEEN == [("start", 1), ("close", 1)]
    assert store.tier(ref.digest) is Tier.FAILED and store.attendant(ref.digest) is None


class Pages:
    """Another tenant of a device: pages, of which some are idle."""

    def __init__(self, n_bytes, n_idle):
        self.n_bytes, self.n_idle, self.user = n_bytes, n_idle, set()

    def taken(self):
        yield "pages", self.n_bytes

    def late(self):
        return ""

    def holders(self):
        return self.user

    def spare(self, n_bytes):
        return self.give_back if self.n_idle else None

    def give_back(self):
        self.n_bytes, self.n_idle = self.n_bytes - MIB, self.n_idle - 1
        return True


def test_another_tenant_gives_back_what_it_can_spare_and_no_more_than_is_needed(store):
    pages = Pages(6 * MIB, n_idle=4)
    store.device.add(pages)
    with store.acquire([context(1, 6)]):
        assert (pages.n_bytes, pages.n_idle) == (4 * MIB, 2)
        store.validate()
    assert store.device.reclaim()
    assert (pages.n_bytes, pages.n_idle) == (2 * MIB, 0)
    store.device.remove(pages)
    with store.acquire([context(2, 10)]):
        store.validate()


def test_a_request_waits_for_what_is_in_use_and_gets_what_is_given_back():
    changed = threading.Condition()
    budget = DeviceBudget(lambda: 10 * MIB, changed, Turns(changed))
    pages, granted = Pages(10 * MIB, n_idle=0), threading.Event()
    pages.user = {-1}  # a thread that waits for nothing
    budget.add(pages)
    request = Request("weights", 4 * MIB)
    waiting = threading.Thread(target=budget.reserve, args=(request, granted.set), daemon=True)
    waiting.start()
    assert not granted.wait(0.2)
    with changed:
        pages.n_bytes = 6 * MIB
        changed.notify_all()
    assert granted.wait(30)
    waiting.join(30)


class Borrower(Pool):
    """An attendant that needs memory beside its own."""

    def lend(self, borrow):
        SEEN.append(("lend", self.model.number))
        self.borrow = borrow

    def n_waiting(self):
        return self.model.number

    def needed_bytes(self):
        return self.model.number * MIB


class Borrowing(Served):
    def attend(self):
        return Borrower(self)


def test_one_that_borrows_is_told_where_before_it_starts(store):
    store.lend(lambda: "cpu", lambda: {"cpu": "cpu"})
    one, two = context(3, 2, load=Borrowing), context(4, 2, load=Served)
    with store.acquire([one, two]):
        assert SEEN.index(("lend", 3)) < SEEN.index(("start", 3)) and ("lend", 4) not in SEEN
        assert store.n_waiting() == 3 and store.needed_bytes() == {one.digest: 3 * MIB}
        attendant = store.attendant(one.digest)
        # 2 MiB of 10 are left: its own device's go to no other than its own engine.
        assert attendant.borrow("device", 3 * MIB) is None
        loan = attendant.borrow("device", 2 * MIB)
        assert loan is not None
        loan.on_wanted(loan.close)
    with store.acquire([context(5, 2)]):
        assert loan.is_closed  # rather than that a context goes
        assert store.tier(two.digest) is Tier.DEVICE


class Broken(Pool):
    """An attendant that stops by an error when the test says so."""

    def on_stopped(self, call):
        self.stop = call


class Stopping(Served):
    def attend(self):
        return Broken(self)


def test_one_that_has_stopped_takes_its_context_along_once_no_task_holds_it(store):
    one = context(1, load=Stopping)
    with store.acquire([one]) as (live,):
        before = store.attendant(one.digest)
        before.stop()
        assert store.tier(one.digest) is Tier.DEVICE
        del live
    until(lambda: store.tier(one.digest) is Tier.ABSENT)
    with store.acquire([one]):
        assert store.attendant(one.digest) is not before and store.n_loads(one.digest) == 1
        before.stop()  # of a life that is over
    assert store.tier(one.digest) is Tier.DEVICE
    store.attendant(one.digest).stop()  # nothing holds it
    until(lambda: store.tier(one.digest) is Tier.ABSENT)
