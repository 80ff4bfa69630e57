"""What a worker can spare, its neighbours have, until it is wanted back or an end dies."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest
import torch

from dask_pcm.ladder.budget import Request
from dask_pcm.ladder.lending import Loan, wire
from dask_pcm.tiers import Tier
from tests.ladder.lending.conftest import MIB, wait_for
from tests.ladder.test_budget import context, used


def returns_when_asked(loan):
    """A borrower that needs no time."""
    loan.on_wanted(loan.close)
    return loan


@pytest.mark.parametrize("rung", ["neighbour", "host"])
def test_parts_of_what_is_spare_are_lent_and_no_more(host, rung):
    lender = host.worker(10, 10)
    borrowers = [host.worker(), host.worker()]
    loans = [
        borrowers[0].lending.borrow(rung, 4 * MIB),
        borrowers[1].lending.borrow(rung, 4 * MIB),
    ]
    assert [loan.memory().numel() for loan in loans] == [4 * MIB, 4 * MIB]
    assert borrowers[0].lending.borrow(rung, 4 * MIB) is None  # 2 MiB are left
    assert lender.lending.leases.lent_bytes() == 8 * MIB
    for loan in loans:
        loan.close()
    wait_for(lambda: not lender.lending.leases.lent_bytes())


def test_memory_of_the_host_is_taken_by_the_lender_and_shared(host):
    host.worker(0, 10)
    borrower = host.worker()
    before = psutil.Process().memory_info().rss
    loan = borrower.lending.borrow("host", 8 * MIB)
    assert os.fstat(loan.fd).st_blocks * 512 >= 8 * MIB  # there before the borrower writes it
    assert psutil.Process().memory_info().rss - before < 8 * MIB  # and not mapped by the lender
    with pytest.raises(PermissionError):  # sealed: it does not vanish under who has mapped it
        os.ftruncate(loan.fd, MIB)
    loan.memory().fill_(7)
    assert loan.memory().sum().item() == 7 * 8 * MIB
    loan.close()


def test_what_a_lender_needs_itself_it_gets_back(host):
    lender, borrower = host.worker(10), host.worker()
    loans = [returns_when_asked(borrower.lending.borrow("neighbour", 2 * MIB)) for _ in range(4)]
    lender.device.reserve(Request("mine", 5 * MIB), lambda: None)
    # 2 MiB were free; the last two had to come back for the other 3.
    assert [loan.is_closed for loan in loans] == [False, False, True, True]
    assert lender.lending.leases.lent_bytes() == 4 * MIB


def test_nothing_is_lent_while_it_is_asked_back_or_not_offered(host):
    lender, borrower, third = host.worker(10), host.worker(), host.worker()
    loan = borrower.lending.borrow("neighbour", 4 * MIB)
    asked = threading.Event()
    loan.on_wanted(asked.set)
    reclaiming = threading.Thread(target=lender.lending.leases.reclaim)
    reclaiming.start()
    assert asked.wait(10)
    assert third.lending.borrow("neighbour", MIB) is None
    loan.close()
    reclaiming.join(10)
    assert not reclaiming.is_alive()
    lender.lending.leases.is_offering = False
    fourth = host.worker()
    assert fourth.lending.borrow("neighbour", MIB) is None
    # What it does not offer to others, its own engines may have.
    loan = lender.lending.borrow("device", MIB)
    assert loan is not None
    loan.close()


def test_a_borrower_that_hangs_delays_its_lender_and_no_one_dies(host, monkeypatch, caplog):
    monkeypatch.setattr("dask_pcm.ladder.lending.leases._WAIT_S", 0.2)
    lender, borrower = host.worker(10, name="tcp://lender"), host.worker(name="tcp://borrower")
    loan = borrower.lending.borrow("neighbour", 8 * MIB)
    done = threading.Event()

    def load():
        lender.device.reserve(Request("mine", 5 * MIB), done.set)

    loading = threading.Thread(target=load)
    loading.start()
    wait_for(lambda: "tcp://borrower has not returned 8,388,608 bytes" in caplog.text)
    assert not done.is_set() and loan.is_wanted_back
    loan.memory().fill_(1)  # it is there all the same
    loan.close()
    assert done.wait(10)
    loading.join()


def test_an_end_that_dies_ends_its_leases(host):
    lender, borrower = host.worker(10, 10), host.worker()
    loans = [borrower.lending.borrow(rung, 2 * MIB) for rung in ("neighbour", "host")]
    loans[1].memory().fill_(3)
    lender.lending._server.close()  # as the kernel does for a process that was killed
    wait_for(lambda: all(loan.is_wanted_back for loan in loans))
    assert loans[1].memory().sum().item() == 3 * 2 * MIB  # never unmapped under its user
    for loan in loans:
        loan.close()
    lender, borrower = host.worker(10, 10), host.worker()
    loans = [borrower.lending.borrow(rung, 2 * MIB) for rung in ("neighbour", "host")]
    assert lender.lending.leases.lent_bytes() == 4 * MIB
    borrower.lending._server.close()
    wait_for(lambda: not lender.lending.leases.lent_bytes())
    for loan in loans:
        loan.close()


@pytest.mark.parametrize("dies", ["lender", "borrower"])
def test_children_that_a_process_leaves_keep_no_lease(host, dies):
    """A user's function may fork: to read data in parallel, for instance."""
    lender, borrower = host.worker(10, 10), host.worker()
    loans = [borrower.lending.borrow(rung, 2 * MIB) for rung in ("neighbour", "host")]
    loans[1].memory().fill_(3)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until the parent closes its end
        os._exit(0)
    try:
        # The one is the lender's keeper's, which is a nanny's process elsewhere.
        wait_for(lambda: _files(child).count("dask_pcm lent") == 1)
        {"lender": lender, "borrower": borrower}[dies].lending._server.close()  # as by SIGKILL
        wait_for(lambda: all(loan.is_wanted_back for loan in loans))
        for loan in loans:
            loan.close()
        wait_for(lambda: not lender.lending.leases.lent_bytes())
        assert len(wire.lenders(host.cluster)) == 1
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def _files(pid):
    """Names of what a process has open and mapped."""
    folder = Path("/proc", str(pid))
    links = [os.readlink(link) for link in (folder / "fd").iterdir()]
    return " ".join([*links, (folder / "maps").read_text()])


def test_a_worker_whose_gate_is_a_new_one_lends_to_that_cluster(host):
    lender, borrower = host.worker(10), host.worker()
    loan = borrower.lending.borrow("neighbour", MIB)
    lender.lending.open("another" + host.cluster, "lender")
    wait_for(lambda: loan.is_wanted_back and not lender.lending.leases.lent_bytes())
    loan.close()
    assert wire.lenders(host.cluster) == [borrower.lending._server.address]
    borrower.lending.open("another" + host.cluster, "borrower")
    loan = borrower.lending.borrow("neighbour", MIB)
    assert loan is not None
    loan.close()


def test_lenders_that_have_nothing_are_not_asked_all_the_time(host, monkeypatch):
    host.worker()
    borrower = host.worker()
    asked = []
    monkeypatch.setattr(wire, "connect", lambda address, timeout_s: asked.append(address))
    assert [borrower.lending.borrow("host", MIB) for _ in range(5)] == [None] * 5
    assert len(asked) == 1
    assert borrower.lending.borrow("host", MIB // 2) is None and len(asked) == 2  # less may do


def test_a_lender_that_does_not_answer_is_left_alone(host, monkeypatch):
    """Its process is stopped: the kernel accepts connections all the same."""
    monkeypatch.setattr("dask_pcm.ladder.lending.lending._SILENT_S", 30.0)
    borrower = host.worker()
    silent = wire.listen(host.cluster)
    assert borrower.lending.borrow("neighbour", MIB) is None
    address = os.fsdecode(silent.getsockname())
    assert borrower.lending._silent[address][1] == 30.0
    borrower.lending._silent[address] = (0.0, 30.0)  # asked again after that
    borrower.lending._rests.clear()
    assert borrower.lending.borrow("neighbour", MIB) is None
    assert borrower.lending._silent[address][1] == 60.0
    borrower.lending._rests.clear()
    lender, connect, asked = host.worker(10), wire.connect, []

    def connected(address, timeout_s):
        asked.append(address)
        return connect(address, timeout_s)

    monkeypatch.setattr(wire, "connect", connected)
    loan = borrower.lending.borrow("neighbour", MIB // 2)
    assert loan is not None and asked == [lender.lending._server.address]
    loan.close()
    silent.close()
    wait_for(lambda: not lender.lending.leases.lent_bytes())


def test_memory_of_the_host_may_take_as_long_as_it_is_large(host, monkeypatch):
    """It is filled before it is lent, and the nanny is asked."""
    monkeypatch.setattr("dask_pcm.ladder.lending.lending._ANSWER_S", 0.2)
    monkeypatch.setattr("dask_pcm.ladder.lending.lending._FILL_S", 10.0 / MIB)
    lender, borrower = host.worker(0, 10), host.worker()
    leases, may_answer = lender.lending.leases, threading.Event()
    grant = leases.grant

    def slow(*args, **options):
        assert may_answer.wait(20)
        return grant(*args, **options)

    monkeypatch.setattr(leases, "grant", slow)
    threading.Timer(1.0, may_answer.set).start()
    loan = borrower.lending.borrow("host", MIB)
    assert loan is not None
    loan.close()
    wait_for(lambda: not leases.lent_bytes())
    may_answer.clear()  # and not longer: what is granted then belongs to no one, and is ended
    assert borrower.lending.borrow("host", MIB // 8) is None
    may_answer.set()
    wait_for(lambda: not leases.lent_bytes() and not lender.lending._server._leased)


def test_what_a_process_takes_on_a_neighbours_gpu_counts_once_and_until_it_ends(host, monkeypatch):
    """The context of CUDA. Torch's device without memory plays the part of the GPU."""
    monkeypatch.setattr("dask_pcm.ladder.lending.lending._CUDA_CONTEXT_BYTES", 4 * MIB)
    small, lender, borrower = host.worker(3), host.worker(10), host.worker()
    borrower.lending._devices = lambda: {"cpu": "meta"}
    loans = [borrower.lending.borrow("neighbour", MIB) for _ in range(2)]
    assert all(loan.memory().is_meta for loan in loans)
    assert lender.lending.leases.lent_bytes() == 6 * MIB
    assert not small.lending.leases.lent_bytes()  # it has no room for that
    for loan in loans:
        loan.close()
    wait_for(lambda: lender.lending.leases.lent_bytes() == 4 * MIB)
    lender.lending.leases.reclaim()  # the process is there: only its end gives it back
    assert lender.lending.leases.lent_bytes() == 4 * MIB
    borrower.close()
    wait_for(lambda: not lender.lending.leases.lent_bytes())


@pytest.mark.parametrize("n_bytes", [None, 10**400, "x", [1]])
def test_a_request_that_makes_no_sense_ends_no_lender(host, n_bytes):
    lender, borrower = host.worker(10, 10), host.worker()
    for medium in ("cpu", "host"):
        connection = wire.connect(lender.lending._server.address)
        wire.send(connection, {"medium": medium, "n_bytes": n_bytes, "name": "x"})
        assert wire.receive(connection) in [({"epoch": None}, None), None]
        connection.close()
    loan = borrower.lending.borrow("neighbour", MIB)
    assert loan is not None
    loan.close()


def test_a_worker_whose_server_has_ended_borrows_nothing_and_keeps_nothing(host):
    host.worker(10)
    borrower = host.worker()
    loan = borrower.lending.borrow("neighbour", MIB)
    server = borrower.lending._server
    server.close()
    assert loan.is_wanted_back and borrower.lending.borrow("neighbour", MIB) is None
    late = Loan(1, "cpu", MIB, "x", device="cpu")
    server.watch(wire.listen(host.cluster), late)  # as one that was granted at that moment
    assert late.is_wanted_back
    loan.close()


def test_one_that_is_closed_is_not_opened_any_more(host):
    """A worker's plugin opens it on another thread, and may be gone by then."""
    store = host.worker(10)
    store.close()
    store.lending.open(host.cluster, "late")
    assert wire.lenders(host.cluster) == []


def test_opening_again_with_the_same_token_ends_no_lease(host):
    lender, borrower = host.worker(10), host.worker()
    loan = borrower.lending.borrow("neighbour", MIB)
    for store in (lender, borrower):
        store.lending.open(host.cluster, "again")
    assert not loan.is_wanted_back and lender.lending.leases.lent_bytes() == MIB
    loan.close()


def test_a_context_that_waits_for_room_gives_its_lender_the_memory_back(host):
    """Its own device is held by a task; and its lender needs what it has lent."""
    lender, borrower = host.worker(10), host.worker(5, 100)
    one, two = context(1), context(2)
    assert used(borrower, one) == 1
    with borrower.acquire([two]):
        assert lender.lending.leases.lent_bytes() == 4 * MIB
        found = []
        loading = threading.Thread(target=lambda: found.append(used(borrower, one)))
        loading.start()
        wait_for(lambda: borrower._residencies.by_digest[one.digest].waits_for_room)
        lender.device.reserve(Request("mine", 8 * MIB), lambda: None)
        assert not lender.lending.leases.lent_bytes() and loading.is_alive()
    loading.join(20)
    assert found == [1] and borrower.n_loads(one.digest) == 1
    # The reservation stands for a context that has loaded since.


def test_one_that_waits_for_room_and_finds_none_elsewhere_is_loaded_anew(host):
    lender, borrower = host.worker(10), host.worker(5, 0)
    one, two = context(1), context(2)
    assert used(borrower, one) == 1
    with borrower.acquire([two]):
        found = []
        loading = threading.Thread(target=lambda: found.append(used(borrower, one)))
        loading.start()
        wait_for(lambda: borrower._residencies.by_digest[one.digest].waits_for_room)
        lender.device.reserve(Request("mine", 8 * MIB), lambda: None)
        assert not lender.lending.leases.lent_bytes()
    loading.join(20)
    assert found == [1] and borrower.n_loads(one.digest) == 2


def test_an_informer_takes_nothing_from_its_own_engines(host):
    worker, other = host.worker(10), host.worker()
    own, lent = worker.lending.borrow("device", MIB), other.lending.borrow("neighbour", MIB)
    returns_when_asked(lent)
    assert worker.lending.leases.reclaim(with_own=False)
    assert lent.is_closed and not own.is_wanted_back
    returns_when_asked(own)
    worker.device.reserve(Request("mine", 10 * MIB), lambda: None)
    assert own.is_closed


def test_workers_of_another_cluster_and_nonsense_are_refused(host):
    lender = host.worker(10)
    address = lender.lending._server.address
    assert wire.lenders("another") == [] and wire.lenders(host.cluster) == [address]
    for message in (
        {"medium": "cpu"},
        {"medium": "cpu", "n_bytes": "many", "name": "x"},
        {"medium": "cuda:1", "n_bytes": 1, "name": "x"},
        {"medium": "cpu", "n_bytes": 11 * MIB, "name": "x"},
        {"medium": "cpu", "n_bytes": -5, "name": "x"},
        {"medium": "host", "n_bytes": 0, "name": "x"},
    ):
        connection = wire.connect(address)
        wire.send(connection, message)
        assert wire.receive(connection) in [({"epoch": None}, None), None], message
        connection.close()
    connection = wire.connect(address)
    connection.send(b"not json")
    assert wire.receive(connection) is None
    connection.close()
    assert lender.lending.leases.lent_bytes() == 0


def test_a_context_goes_to_a_neighbours_device_and_comes_back(host):
    lender, borrower = host.worker(10, name="rich"), host.worker(5, 100)
    one, two = context(1), context(2)
    assert [used(borrower, ref) for ref in (one, two)] == [1, 2]  # 4 MiB each: one makes room
    assert borrower.tier(one.digest) is Tier.HOST
    assert lender.lending.leases.lent_bytes() == 4 * MIB
    assert used(borrower, one) == 1 and borrower.n_loads(one.digest) == 1
    # Two made room, in turn: memory of the first loan is back.
    wait_for(lambda: lender.lending.leases.lent_bytes() == 4 * MIB)


@pytest.mark.parametrize("host_mib", [100, 0])
def test_a_context_moves_on_if_the_memory_is_wanted_back(host, host_mib):
    lender, borrower = host.worker(10), host.worker(5, host_mib)
    one, two = context(1), context(2)
    assert [used(borrower, ref) for ref in (one, two)] == [1, 2]
    lender.device.reserve(Request("mine", 8 * MIB), lambda: None)
    assert not lender.lending.leases.lent_bytes()
    wait_for(lambda: borrower.tier(one.digest) in (Tier.HOST, Tier.ABSENT))
    assert borrower.tier(one.digest) is (Tier.HOST if host_mib else Tier.ABSENT)
    assert used(borrower, one) == 1
    assert borrower.n_loads(one.digest) == 1  # loaded once, or once since it was dropped


def test_without_room_on_its_host_tier_a_context_goes_to_that_of_a_neighbour(host):
    lender, borrower = host.worker(0, 10), host.worker(5, 0)
    one, two = context(1), context(2)
    assert [used(borrower, ref) for ref in (one, two)] == [1, 2]
    assert borrower.tier(one.digest) is Tier.HOST
    assert lender.lending.leases.lent_bytes("host") == 4 * MIB
    value = torch.tensor(used(borrower, one))
    assert value == 1 and borrower.n_loads(one.digest) == 1
    # The lender needs its host tier: for another context of its own.
    assert lender.lending.leases.reclaim()
    wait_for(lambda: borrower.tier(two.digest) is Tier.ABSENT)  # no other room


def test_a_lenders_own_contexts_get_its_host_tier_back(host):
    lender, borrower = host.worker(5, 5), host.worker(5, 0, sees_devices=False)
    one, two, three, four = (context(number) for number in (1, 2, 3, 4))
    assert [used(borrower, ref) for ref in (one, two)] == [1, 2]
    assert lender.lending.leases.lent_bytes("host") == 4 * MIB
    assert used(lender, three) == 3  # without a copy on the host tier, which has no room for it
    assert lender.lending.leases.lent_bytes("host") == 4 * MIB
    assert used(lender, four) == 4
    assert lender.tier(three.digest) is Tier.HOST
    assert not lender.lending.leases.lent_bytes("host")
    assert used(lender, three) == 3 and lender.n_loads(three.digest) == 1


def test_what_is_borrowed_is_told_before_it_is_used(host):
    told = []
    host.worker(10)
    borrower = host.worker(on_borrowed=told.append)
    first, second = (borrower.lending.borrow("neighbour", n * MIB) for n in (1, 2))
    first.close()
    second.close()
    assert told == [MIB, 3 * MIB, 2 * MIB, 0]
