"""Fairness between clients."""

from __future__ import annotations

from collections import Counter

from dask_pcm.scheduling.events import Group, Work, WorkEnded, WorkParked
from tests.support.gate_world import World, assigned

ANN, BOB = (Group(("a",), "infer", client=name) for name in ("ann", "bob"))


def park(world, group, n, first=0, priority=0, n_rows=1.0):
    for i in range(first, first + n):
        key, order = (group.client, i), (priority, float(i))
        world.tell(WorkParked(Work(key, group, order, n_rows)))


def served(world, n, seconds=1.0):
    """Whom the one worker works for, piece by piece."""
    found = []
    for _ in range(n):
        found += [key[0] for key, _ in assigned(world.decide())]
        world.now += seconds
        for key in list(world.state.placed):
            world.tell(WorkEnded(key, is_finished=True))
    return found


def one_worker(row_s=1.0):
    world = World("w", n_lanes=1)
    world.warm("w")
    for group in (ANN, BOB):
        world.learn(group, "w", row_s)
    return world


def test_clients_share_regardless_of_arrival_order():
    world = one_worker()
    park(world, ANN, 100)
    assert served(world, 5) == ["ann"] * 5
    park(world, BOB, 100, first=1000)
    assert Counter(served(world, 40)) == {"ann": 20, "bob": 20}


def test_they_share_seconds_and_not_pieces():
    world = one_worker()
    park(world, ANN, 100, n_rows=3.0)
    park(world, BOB, 100, first=1000, n_rows=1.0)
    counts = Counter(served(world, 40))
    assert counts["bob"] == 30 and counts["ann"] == 10


def test_idle_time_earns_no_credit():
    world = one_worker()
    park(world, BOB, 1, first=1000)
    park(world, ANN, 100)
    served(world, 50)
    park(world, BOB, 100, first=2000)
    assert Counter(served(world, 20)) == {"ann": 10, "bob": 10}


def test_what_users_have_put_first_goes_first_all_the_same():
    world = one_worker()
    park(world, ANN, 10)
    park(world, BOB, 10, priority=-5)
    assert served(world, 10) == ["bob"] * 10


def test_within_a_client_the_order_is_dasks():
    world = one_worker()
    park(world, ANN, 5)
    found = []
    for _ in range(5):
        found += [key[1] for key, _ in assigned(world.decide())]
        world.now += 1.0
        world.tell(*(WorkEnded(key, True) for key in list(world.state.placed)))
    assert found == [0, 1, 2, 3, 4]


def test_clients_that_are_gone_are_forgotten():
    world = one_worker()
    for number in range(100):
        group = Group(("a",), "infer", client=f"client{number}")
        park(world, group, 1)
        world.tell(WorkEnded(*[(assigned(world.decide())[0][0]), True]))
    assert len(world.state.ahead.shares.served_s) <= 2
