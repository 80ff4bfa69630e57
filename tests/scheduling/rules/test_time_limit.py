"""Loads that take longer than workers live."""

from __future__ import annotations

import pytest

from dask_pcm.scheduling.actions import Fail
from dask_pcm.scheduling.events import (
    PoolsDeclared,
    ResidencyReported,
    RunClosed,
    RunReported,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
)
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, World, warmed


@pytest.fixture
def world():
    world = World()
    world.tell(PoolsDeclared({"short": None}), RunReported("run", A, 1000.0, 10))
    world.park(2)
    return world


def live(world, name, lived_s, limit_s=60.0, pool="short"):
    """A worker joins, loads and ends."""
    world.tell(WorkerJoined(name, 1, pool=pool, ends_in_s=limit_s))
    assert warmed(world.decide()) == {name}
    world.tell(ResidencyReported(name, "a", Tier.LOADING))
    world.now += lived_s
    world.tell(WorkerDraining(name, 0.0), WorkerLeft(name, is_lost=False))


def failed(world):
    return [action.error for action in world.decide() if isinstance(action, Fail)]


def test_after_three_workers_the_work_fails_with_the_numbers(world):
    for k in range(3):
        assert not failed(world)
        live(world, f"w{k}", 55.0)
    first, second = failed(world)
    assert first == second
    assert "'a' takes longer to load than its workers live: 3 of them" in first
    assert "time limit was 60 s or less, loaded for 55 s" in first and "walltime" in first
    # So does what else the run asks for, also while there is a worker, which would fare alike.
    world.park(1, start=9)
    world.tell(WorkerJoined("w3", 1, pool="short", ends_in_s=60.0))
    assert failed(world) == [first]
    world.tell(RunClosed("run"))
    world.park(1, start=10)
    assert not failed(world)  # asked for anew: it is tried again


def test_preempted_workers_say_nothing_of_the_load(world):
    for k in range(6):
        live(world, f"w{k}", 20.0)
    live(world, "endless", 1e4, limit_s=float("inf"))
    assert not failed(world)


@pytest.mark.parametrize("other", ["pool", "worker", "warm"])
def test_work_waits_while_others_may_live_longer(world, other):
    if other == "pool":
        world.tell(PoolsDeclared({"short": None, "long": None}))
    for k in range(3):
        live(world, f"w{k}", 55.0)
    if other != "pool":
        world.tell(WorkerJoined("last", 1, pool="short", ends_in_s=3600.0))
    if other == "warm":
        world.warm("last")
    assert not failed(world)


def test_a_load_that_ends_clears_what_was_noted(world):
    for k in range(2):
        live(world, f"w{k}", 55.0)
    world.tell(WorkerJoined("lucky", 1, pool="short", ends_in_s=60.0))
    world.warm("lucky")
    world.tell(WorkerLeft("lucky"))
    live(world, "next", 55.0)
    assert not failed(world)
