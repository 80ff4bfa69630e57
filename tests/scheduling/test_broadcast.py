"""The plan of copies, played without a network."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_pcm.scheduling.broadcast import STORE, Broadcast, Copy

N = 16


def play(plan, fails=lambda copy: False, queue=(), limit=10_000):
    """Carry out copies one at a time, in the order they were begun; what was copied from where."""
    done, queue, now = [], list(queue), 0.0
    for _ in range(limit):
        queue += plan.plan(now)
        plan.validate()
        if not queue:
            if not any(any(swarm.missing.values()) for swarm in plan._swarms.values()):
                return done
            now += 1.0
            continue
        copy = queue.pop(0)
        if fails(copy):
            plan.failed(copy, now)
        else:
            plan.copied(copy)
            done.append(copy)
    raise AssertionError("it does not end")


def test_the_store_is_read_once_for_any_number_of_workers():
    plan = Broadcast()
    for number in range(10):
        plan.want(f"w{number}", "blob", N)
    done = play(plan)
    assert Counter(copy.source == STORE for copy in done) == {True: N, False: 9 * N}
    assert len({(copy.worker, copy.chunk) for copy in done}) == len(done) == 10 * N


def test_limits_of_concurrent_copies_hold():
    plan = Broadcast(n_from_each=3, n_ahead=2)
    for number in range(10):
        plan.want(f"w{number}", "blob", N)
    first = plan.plan(0.0)
    assert Counter(copy.source for copy in first) == {STORE: 3}
    plan.has("warm", "blob", N)
    more = plan.plan(0.0)
    assert Counter(copy.source for copy in more) == {"warm": 3}
    assert max(Counter(copy.worker for copy in first + more).values()) <= 2


def test_what_a_worker_has_it_serves_before_it_has_the_rest():
    plan = Broadcast()
    plan.want("a", "blob", N)
    plan.want("b", "blob", N)
    first = plan.plan(0.0)
    plan.copied(first[0])
    (given,) = (copy for copy in plan.plan(0.0) if copy.source == first[0].worker)
    assert given.chunk == first[0].chunk and given.worker != first[0].worker


def test_what_is_there_already_is_not_copied():
    plan = Broadcast()
    plan.want("a", "blob", N, have=range(N - 1))
    assert plan.plan(0.0) == [Copy("a", "blob", N - 1, STORE)]


def test_a_source_that_fails_rests_longer_each_time_and_is_not_blamed_for_ever():
    plan = Broadcast(n_from_each=1, n_ahead=1, back_off_s=10.0)
    plan.has("flaky", "blob", N)
    plan.want("a", "blob", N)

    def begun(now):
        (copy,) = plan.plan(now)
        return copy.source, copy

    _, copy = begun(0.0)
    plan.failed(copy, 0.0)
    for now, expected in ((9.9, STORE), (10.0, "flaky")):
        source, copy = begun(now)
        assert source == expected  # without another reachable source, the store serves
        plan.failed(copy, 10.0) if source == "flaky" else plan.copied(copy)
    for now, expected in ((29.9, STORE), (30.0, "flaky"), (30.0, "flaky")):
        source, copy = begun(now)
        assert source == expected
        plan.copied(copy)
    plan.failed(begun(31.0)[1], 31.0)  # forgiven in between: as if for the first time
    source, copy = begun(40.9)
    assert source == STORE
    plan.copied(copy)
    assert begun(41.0)[0] == "flaky"


def test_while_a_source_rests_others_give():
    plan = Broadcast()
    plan.has("liar", "blob", N)
    plan.has("honest", "blob", N)
    plan.want("a", "blob", N)
    done = play(plan, fails=lambda copy: copy.source == "liar")
    assert {copy.source for copy in done} == {"honest"} and len(done) == N


def test_what_a_source_has_lost_is_taken_from_the_store():
    plan = Broadcast(n_ahead=1)
    plan.has("b", "blob", N)
    plan.want("a", "blob", N)
    (copy,) = plan.plan(0.0)
    plan.failed(copy, 0.0, is_absent=True)
    found = {copy.source for copy in plan.plan(0.0)}
    assert found <= {STORE, "b"} and found


def test_when_a_worker_leaves_in_the_midst_others_go_on():
    plan = Broadcast()
    for worker in "abc":
        plan.want(worker, "blob", N)
    queue = plan.plan(0.0)
    for _ in range(10):
        plan.copied(queue.pop(0))
        queue += plan.plan(0.0)
    plan.remove_worker("a")
    play(plan, queue=queue)  # with late words of copies that are off
    assert all(holders == {"b", "c"} for holders in plan._swarms["blob"].holders)
    assert not plan.under_way
    plan.remove_worker("b")
    plan.remove_worker("c")
    assert not plan._swarms


def test_several_blobs_at_once():
    plan = Broadcast()
    for worker in "abcd":
        for blob, n_chunks in (("weights", N), ("config", 1), ("empty", 0)):
            plan.want(worker, blob, n_chunks)
    done = play(plan)
    assert Counter(copy.blob for copy in done) == {"weights": 4 * N, "config": 4}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 20))
def test_all_workers_get_all_chunks_despite_failures(seed, n_workers, n_chunks):
    """Copies end in any order or fail, workers join and leave: invariants hold, and it ends."""
    chance, plan, now = random.Random(seed), Broadcast(back_off_s=1.0), 0.0
    workers = [f"w{number}" for number in range(n_workers)]
    has = {worker: set() for worker in workers}
    for worker in workers:
        plan.want(worker, "blob", n_chunks)
    queue = []
    for step in range(20_000):
        now += 0.1
        queue += plan.plan(now)
        assert all(n <= 3 for n in Counter(copy.source for copy in plan.under_way).values())
        assert all(n <= 2 for n in Counter(copy.worker for copy in plan.under_way).values())
        if all(len(chunks) == n_chunks for chunks in has.values()):
            break
        if step < 200 and chance.random() < 0.02:
            gone = chance.choice(workers)
            plan.remove_worker(gone)
            has[gone] = set()
            plan.want(gone, "blob", n_chunks)
            continue
        if not queue:
            continue
        copy = queue.pop(chance.randrange(len(queue)))
        is_valid = copy in plan.under_way
        if is_valid and copy.source != STORE and copy.chunk not in has[copy.source]:
            plan.failed(copy, now, is_absent=True)
        elif step < 2_000 and chance.random() < 0.1:
            plan.failed(copy, now)
        else:
            plan.copied(copy)
            if is_valid:
                has[copy.worker].add(copy.chunk)
    else:
        pytest.fail("it does not end")


def test_a_hanging_read_delays_others_for_a_limited_time():
    """Neither those who want other blobs nor, after a while, those who want the same chunk."""
    plan = Broadcast(hangs_s=60.0)
    for worker in ("a", "b"):
        plan.want(worker, "hangs", N)
    assert len(plan.plan(0.0)) == 3
    plan.want("c", "other", N)
    assert {copy.blob for copy in plan.plan(1.0)} == {"other"}
    plan.want("d", "hangs", N)
    assert not [copy for copy in plan.plan(59.0) if copy.blob == "hangs"]
    assert [copy for copy in plan.plan(60.0) if copy.blob == "hangs"]
