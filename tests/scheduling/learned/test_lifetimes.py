from __future__ import annotations

import math
import random

import pytest

from dask_pcm.scheduling.events import (
    ContextDeclared,
    ResidencyReported,
    RunReported,
    WorkEnded,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
)
from dask_pcm.scheduling.learned.lifetimes import Lifetimes, expected_s
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, World, assigned, warmed


def test_the_formula_is_what_a_simulation_finds():
    draw = random.Random(1)
    hazard, seconds, taken = 1 / 40, 60.0, []
    for _ in range(20_000):
        total = 0.0
        while (life := draw.expovariate(hazard)) < seconds:
            total += life
        taken.append(total + seconds)
    assert expected_s(seconds, hazard) == pytest.approx(sum(taken) / len(taken), rel=0.05)


def test_a_pools_hazard_is_learned():
    pool, now = Lifetimes(), 0.0
    for _ in range(200):
        pool.add_worker(now)
        pool.remove_worker(now, now + 60.0, is_lost=True)
        now += 60.0
    assert 1 / pool.hazard(now) == pytest.approx(60.0, rel=0.3)
    steady = Lifetimes()
    steady.add_worker(0.0)
    assert steady.hazard(36_000.0) < steady.hazard(0.0) < 1 / 3_600


def test_who_was_asked_to_go_is_no_loss_and_who_was_taken_with_notice_is():
    world = World("w0", "w1", "w2")
    world.now = 10.0
    world.tell(WorkerLeft("w0", is_lost=False))
    assert world.state.estimates.pools[""].n_lost == 0
    world.tell(WorkerDraining("w1", 5.0), WorkerLeft("w1", is_lost=False))
    assert world.state.estimates.pools[""].n_lost == 1
    world.tell(WorkerLeft("w2"))
    assert world.state.estimates.pools[""].n_lost == 2


def ending(world, worker, seconds, n_lanes=1):
    world.tell(WorkerJoined(worker, n_lanes, ends_in_s=seconds))
    world.warm(worker)


def test_nothing_goes_to_a_worker_that_would_end_before():
    world = World()
    ending(world, "ends", 9.0)
    ending(world, "stays", 100.0)
    for worker in ("ends", "stays"):
        world.learn(A, worker, 10.0)
    world.park(2)
    assert assigned(world.decide()) == [("a0", "stays")]
    assert assigned(world.decide()) == []


def test_work_longer_than_any_lifetime_starts_on_the_longest_lived_worker():
    world = World()
    ending(world, "short", 5.0)
    ending(world, "longer", 9.0)
    for worker in ("short", "longer"):
        world.learn(A, worker, 10.0)
    world.park(1)
    assert assigned(world.decide()) == [("a0", "longer")]


def test_a_worker_that_was_told_works_on_until_its_end():
    world = World(n_lanes=1)
    ending(world, "w", math.inf)
    world.learn(A, "w", 1.0)
    world.park(5)
    world.tell(WorkerDraining("w", 3.0))
    assert assigned(world.decide()) == [("a0", "w")]
    world.now = 2.5
    world.tell(WorkEnded("a0", is_finished=True))
    assert assigned(world.decide()) == []


def test_no_worker_is_warmed_that_cannot_pay_it_back():
    world = World()
    world.tell(WorkerJoined("w", 1))
    world.warm("w", seconds=10.0)
    world.learn(A, "w", 1.0)
    world.tell(WorkerJoined("ends", 1, ends_in_s=10.5), WorkerJoined("told", 1))
    world.tell(WorkerDraining("told", 1000.0))
    world.tell(RunReported("run", A, 1000.0, 100))
    assert warmed(world.decide()) == set()
    world.tell(WorkerJoined("lasts", 1, ends_in_s=20.0))
    assert warmed(world.decide()) == {"lasts"}


def test_long_work_goes_where_workers_last():
    """Two pools as fast as each other; in one, workers live for ten seconds."""
    world = World()
    for number in range(100):
        world.tell(WorkerJoined(f"old{number}", 1, pool="spot"))
        world.now += 10.0
        world.tell(WorkerLeft(f"old{number}"))
    for worker, pool in (("a-spot", "spot"), ("b-steady", "steady")):
        world.tell(WorkerJoined(worker, 1, pool=pool))
        world.warm(worker)
    for worker in ("a-spot", "b-steady"):
        world.learn(A, worker, 30.0)
    world.park(2)
    assert assigned(world.decide()) == [("a0", "b-steady")]
    world.park(20, start=2)  # there is so much that the other may try its luck
    assert {worker for _, worker in assigned(world.decide())} == {"a-spot"}


@pytest.mark.parametrize("life_s", [5.0, 20.0])
def test_work_begins_under_any_lifetime(life_s):
    world = World()
    for number in range(50):
        world.tell(WorkerJoined(f"old{number}", 1))
        world.now += life_s
        world.tell(WorkerLeft(f"old{number}"))
    for worker in ("x", "y"):
        world.tell(WorkerJoined(worker, 1))
        world.warm(worker)
        world.learn(A, worker, 100.0)
    world.park(1)
    assert len(assigned(world.decide())) == 1


def test_before_costs_are_known_an_ending_worker_is_not_warmed():
    world = World()
    world.tell(ContextDeclared("a", "a", 10**10))  # ten seconds, by its bytes
    world.tell(WorkerJoined("a-dying", 1, ends_in_s=3.0), WorkerJoined("b-fresh", 1))
    world.park(1)
    assert warmed(world.decide()) == {"b-fresh"}


def test_a_worker_that_ends_before_a_piece_delays_no_other():
    world = World()
    ending(world, "fast", 59.0)
    ending(world, "slow", math.inf)
    world.learn(A, "fast", 60.0)
    world.learn(A, "slow", 300.0)
    world.park(1)
    assert assigned(world.decide()) == [("a0", "slow")]


def test_a_worker_is_warmed_even_if_none_lasts():
    world = World()
    world.tell(WorkerJoined("w", 1, ends_in_s=5.0))
    world.warm("w", "a", seconds=2.0)
    world.learn(A, "w", 1.0)
    world.tell(ResidencyReported("w", "a", Tier.ABSENT))
    world.now = 10.0  # it should have ended
    world.park(1)
    assert warmed(world.decide()) == {"w"}
