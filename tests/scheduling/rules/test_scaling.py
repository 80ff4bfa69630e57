"""How many workers the work at the gate asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dask_pcm.scheduling.events import (
    RunClosed,
    RunReported,
    WorkEnded,
    WorkerJoined,
    WorkerLeft,
    WorkWithdrawn,
)
from dask_pcm.scheduling.rules.scaling import Offer, is_needed, n_workers_wanted, spread
from tests.support.gate_world import A, B, World, assigned

TARGET_S = 5.0


def wanted(world, target_s=TARGET_S):
    return n_workers_wanted(world.state, target_s)


def needed(world):
    return {a for a, view in world.state.workers.items() if is_needed(world.state, view)}


def test_nothing_asks_for_nothing():
    assert wanted(World()) == wanted(World("w")) == 0


def test_before_costs_are_known_each_piece_asks():
    world = World()
    world.park(3)
    assert wanted(world) == 3
    world.tell(RunReported("run", A, 20_000.0, 3))  # those that wait are of this run
    assert wanted(world) == 3
    world.tell(RunReported("other", B, 20_000.0, 2))
    assert wanted(world) == 5


@pytest.mark.parametrize(("row_s", "n"), [(0.0001, 1), (0.001, 4), (0.01, 40)])
def test_a_run_asks_by_all_of_its_rows_not_by_what_the_scheduler_holds(row_s, n):
    world = World("w")
    world.learn(A, "w", row_s)
    world.tell(RunReported("run", A, 20_000.0, 3))
    assert wanted(world) == n


def test_costs_outlive_the_workers_that_they_were_learned_on():
    world = World("w")
    world.learn(A, "w", 0.001)
    del world.state.workers["w"]
    world.tell(RunReported("run", A, 20_000.0, 3))
    assert wanted(world) == 4


def test_no_worker_is_asked_for_that_would_load_for_longer_than_the_work_lasts():
    world = World("w")
    world.learn(A, "w", 0.001)
    world.warm("w", seconds=0.0)
    world.state.estimates.cost.observe_warm("a", "", 60.0, is_built=True)
    world.tell(RunReported("run", A, 20_000.0, 3))
    assert wanted(world) == 1
    world.tell(RunReported("run", A, 600_000.0, 3))
    assert wanted(world) == 10


def test_no_worker_is_asked_for_without_a_piece():
    world = World("w")
    world.learn(A, "w", 100.0)
    world.park(2)
    assert wanted(world) == 2


def test_what_is_at_work_counts_until_it_ends():
    world = World("w", "idle")
    world.warm("w")
    world.park(1)
    assert assigned(world.decide()) == [("a0", "w")]
    assert wanted(world) == 1 and needed(world) == {"w"}
    world.tell(WorkEnded("a0", True), WorkWithdrawn("a0"))
    assert wanted(world) == 0 and needed(world) == set()


def test_a_worker_that_is_warm_for_what_is_to_come_is_needed():
    world = World("w", "idle")
    world.warm("w")
    world.tell(RunReported("run", A, 10.0, 1))
    assert needed(world) == {"w"}
    world.tell(RunReported("run", A, 0.0, 0))  # paused
    assert needed(world) == set()
    world.tell(RunClosed("run"))
    assert wanted(world) == 0


def test_pools_are_filled_by_their_speed_and_limits():
    world = World()
    world.tell(
        WorkerJoined("s", 1, device="slow", pool="a10"),
        WorkerJoined("f", 1, device="fast", pool="h100"),
    )
    world.learn(A, "s", 0.003)
    world.learn(A, "f", 0.001)
    world.tell(RunReported("run", A, 20_000.0, 100))
    # Two milliseconds a row in the mean: a fast worker is worth two of these, a slow one 2/3.
    offers = {"a10": Offer(10), "h100": Offer(2)}
    assert spread(world.state, 4.0, offers, 0.0) == {"h100": 2, "a10": 0}
    assert spread(world.state, 6.0, offers, 0.0) == {"h100": 2, "a10": 3}
    assert spread(world.state, 60.0, offers, 0.0) == {"h100": 2, "a10": 10}
    assert spread(world.state, 0.0, offers, 0.0) == {"h100": 0, "a10": 0}
    # Pools of which nothing is known yet count as of mean speed.
    unknown = {"new": Offer(2), "other": Offer(2)}
    assert spread(world.state, 3.0, unknown, 0.0) == {"new": 2, "other": 1}


def test_workers_that_are_there_or_asked_for_come_before_better_ones():
    world = World("f")
    world.tell(WorkerJoined("s", 1, device="slow", pool="a10"))
    world.learn(A, "s", 0.003)
    world.learn(A, "f", 0.001)
    world.tell(RunReported("run", A, 20_000.0, 100))
    offers = {"a10": Offer(10, n_here=3, n_asked=4), "new": Offer(10)}
    assert spread(world.state, 2.0, offers, 0.0) == {"new": 0, "a10": 3}
    assert spread(world.state, 2.6, offers, 0.0) == {"new": 0, "a10": 4}
    # What is slow to come is wanted of the other pool as well, and stays asked for.
    slow = {**offers, "a10": Offer(10, n_here=3, n_asked=4, n_counted=3)}
    assert spread(world.state, 4.0, slow, 0.0) == {"new": 2, "a10": 4}


def test_a_pool_whose_jobs_would_come_after_the_work_gets_no_more():
    world = World("w")
    world.learn(A, "w", 0.001)
    world.tell(RunReported("run", A, 20_000.0, 100))
    offers = {"near": Offer(8, n_here=2, wait_s=20.0), "far": Offer(8, n_here=1, wait_s=600.0)}
    # Three workers at work, of 3,000 s: what waits 20 s helps, what waits ten minutes does not.
    assert spread(world.state, 50.0, offers, 0.0, 900.0) == {"near": 8, "far": 1}
    assert spread(world.state, 50.0, offers, 0.0, 9000.0) == {"near": 8, "far": 8}
    assert spread(world.state, 1.0, offers, 0.0, 30.0) == {"near": 1, "far": 0}
    # While costs are unknown, so is when the work will have ended.
    world.tell(RunReported("other", B, 20_000.0, 100))
    assert spread(world.state, 50.0, offers, 0.0, 30.0) == {"near": 8, "far": 8}
    world.tell(RunClosed("other"))
    # Without a worker there is nobody else to do it.
    absent = {name: replace(offer, n_here=0) for name, offer in offers.items()}
    assert spread(world.state, 50.0, absent, 0.0, 30.0) == {"near": 8, "far": 8}


def test_a_pool_whose_workers_die_while_they_warm_comes_last_and_counts_for_less():
    world = World()
    for pool, lived_s in (("calm", 3600.0), ("wild", 40.0)):
        for k in range(4):
            world.tell(WorkerJoined(f"{pool}{k}", 1, pool=pool))
            world.state.estimates.pools[pool].lived_s += lived_s
        for k in range(4):
            world.tell(WorkerLeft(f"{pool}{k}", is_lost=True))
    world.state.estimates.cost.observe_warm("a", "", 30.0, is_built=True)
    world.tell(RunReported("run", A, 20_000.0, 100))
    offers = {"wild": Offer(8), "calm": Offer(2)}
    found = spread(world.state, 3.0, offers, world.now)
    assert found["calm"] == 2 and 1 < found["wild"] < 8
