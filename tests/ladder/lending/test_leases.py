"""What a lender has lent, beside what its device and its host tier hold."""

from __future__ import annotations

import os
import threading
import time

import pytest

from dask_pcm.errors import DeviceBusyError
from dask_pcm.ladder.budget import DeviceBudget, Request
from dask_pcm.ladder.lending import HOST, Leases
from dask_pcm.ladder.objects.host import Host, LocalKeeper
from dask_pcm.ladder.objects.shelf import Shelf
from dask_pcm.ladder.turns import Turns
from tests.ladder.lending.conftest import MIB, wait_for


class Lender:
    def __init__(self, device_mib=10, host_mib=10, is_free=lambda n_bytes: True):
        changed = threading.Condition()
        self.budget = DeviceBudget(lambda: device_mib * MIB, changed, Turns(changed))
        host = Host(LocalKeeper(Shelf(host_mib * MIB)))
        self.leases = Leases(lambda: "gpu", self.budget, changed, host, is_free)
        self.returned = []

    def lend(self, medium, n_mib, **options):
        def ask_back():  # a borrower that needs no time
            self.returned.append(lease.epoch)
            self.leases.end(lease)

        granted = self.leases.grant(medium, n_mib * MIB, "me", ask_back, **options)
        if granted is None:
            return None
        lease, fd = granted
        if fd is not None:
            os.close(fd)
        return lease


@pytest.fixture
def lender():
    one = Lender()
    yield one
    one.leases.validate()


@pytest.mark.parametrize("medium", ["gpu", HOST])
def test_the_latest_leases_come_back_first_and_no_more_than_is_needed(lender, medium):
    leases = [lender.lend(medium, n) for n in (3, 3, 2)]
    assert [lease.epoch for lease in leases] == [1, 2, 3]
    assert lender.lend(medium, 3) is None
    assert lender.leases.reclaim(medium, 3 * MIB)
    assert lender.returned == [3, 2] and lender.leases.lent_bytes() == 3 * MIB
    assert not lender.leases.reclaim("another")


def test_a_device_that_another_thread_waits_for_is_not_lent(lender, monkeypatch):
    monkeypatch.setattr("dask_pcm.ladder.lending.leases._WAIT_S", 0.1)
    asked = threading.Event()
    held, _ = lender.leases.grant("gpu", 8 * MIB, "one that hangs", asked.set)
    waiting = threading.Thread(
        target=lender.budget.reserve, args=(Request("load", 4 * MIB), lambda: None)
    )
    waiting.start()
    assert asked.wait(10)
    assert lender.lend("gpu", 1) is None and lender.lend("gpu", 1, is_own=True) is None
    lender.leases.end(held)
    waiting.join(10)
    assert not waiting.is_alive()


def test_one_that_hangs_is_waited_for_once(lender, monkeypatch):
    monkeypatch.setattr("dask_pcm.ladder.lending.leases._WAIT_S", 2.0)
    held, _ = lender.leases.grant("gpu", 4 * MIB, "one that hangs", lambda: None)
    begun = time.monotonic()
    assert not lender.leases.reclaim("gpu", 2 * MIB)
    first_s = time.monotonic() - begun
    assert first_s >= 2.0
    wait_for(lambda: held.is_overdue)
    begun = time.monotonic()
    assert not lender.leases.reclaim("gpu", 2 * MIB)
    assert time.monotonic() - begun < first_s


def test_a_load_that_is_refused_names_who_hangs(lender, monkeypatch):
    monkeypatch.setattr("dask_pcm.ladder.lending.leases._WAIT_S", 0.2)
    monkeypatch.setattr("dask_pcm.ladder.lending.leases._OVERDUE_S", 0.5)
    lender.leases.grant("gpu", 4 * MIB, "tcp://hangs", lambda: None)
    with pytest.raises(DeviceBusyError, match="tcp://hangs was lent 4,194,304 of them, and has"):
        lender.budget.reserve(Request("load", 8 * MIB), lambda: None)
    wait_for(lambda: lender.lend("gpu", 1) is not None)  # nothing waits for it any more


def test_what_a_load_frees_is_not_lent_meanwhile(lender):
    found = []

    def ask_back():
        lender.leases.end(lease)
        found.append(lender.lend("gpu", 1))

    lease, _ = lender.leases.grant("gpu", 6 * MIB, "one", ask_back)
    lender.budget.reserve(Request("load", 5 * MIB), lambda: None)
    assert found == [None]
    assert lender.lend("gpu", 1) is not None


def test_what_a_device_does_not_have_is_not_lent():
    lender = Lender(is_free=lambda n_bytes: n_bytes <= 2 * MIB)
    assert lender.lend("gpu", 3) is None and lender.lend("gpu", 2) is not None


def test_what_is_fixed_counts_for_others_and_not_for_the_lender(lender):
    fixed = lender.lend("gpu", 2, is_fixed=True)
    assert lender.lend("gpu", 9) is None and lender.lend("gpu", 8) is not None
    assert lender.leases.reclaim()
    assert lender.leases.lent_bytes("gpu") == 2 * MIB
    granted = []
    lender.budget.reserve(Request("all", 10 * MIB), lambda: granted.append(1))
    assert granted
    lender.leases.end(fixed)
    lender.leases.end(fixed)  # once more changes nothing
    assert lender.leases.lent_bytes() == 0


def test_a_closed_lender_holds_nothing(lender):
    lender.lend("gpu", 2)
    lender.lend(HOST, 2)
    lender.leases.close()
    lender.leases.close()  # once more changes nothing
    assert lender.leases.lent_bytes() == 0
    assert lender.lend(HOST, 1) is None and lender.lend("gpu", 1, is_own=True) is None
    granted = []
    lender.budget.reserve(Request("all", 10 * MIB), lambda: granted.append(1))
    assert granted
