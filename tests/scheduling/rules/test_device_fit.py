"""Which workers and pools have devices that contexts fit, and what fails since none has."""

from __future__ import annotations

import pytest

from dask_pcm.scheduling.actions import Fail, Load
from dask_pcm.scheduling.events import (
    ContextDeclared,
    Group,
    PoolsDeclared,
    ResidencyReported,
    RunReported,
    WorkerJoined,
)
from dask_pcm.scheduling.explain import explain
from dask_pcm.scheduling.rules.fallback import assign_as_dask, stalled
from dask_pcm.scheduling.rules.scaling import Offer, spread
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, B, World, assigned, warmed

POOLS = {"a10": 20, "h100": 70}


@pytest.fixture
def world():
    """A gate with two pools and no workers; context a takes 50 bytes, b takes 10."""
    one = World()
    one.tell(PoolsDeclared(POOLS), ContextDeclared("a", "large", 50), ContextDeclared("b", "b", 10))
    return one


def join(world, worker, pool, device_bytes=None):
    world.tell(WorkerJoined(worker, 1, device_bytes, host=worker, device=pool, pool=pool))


def failed(actions):
    return [action.error for action in actions if isinstance(action, Fail)]


def test_what_fits_on_no_pool_fails_before_a_worker_is_there_with_the_numbers(world):
    world.tell(ContextDeclared("a", "large", 144))
    world.park(2)
    errors = failed(world.decide())
    assert len(errors) == 2
    assert errors[0].startswith(
        "'large' needs 144 bytes on the devices of a worker, which have for contexts: pool 'a10'"
        " 20, pool 'h100' 70. Use a smaller model or data type, a pool with larger devices, or a"
        " larger gpus_per_worker"
    )


def test_what_fits_on_one_pool_waits_for_its_workers_and_goes_only_there(world):
    join(world, "small", "a10", 20)
    world.park(1)
    # Not failed, although it fits on no worker that is there; nor tried there, as Dask would.
    for _ in range(3):
        assert world.decide() == []
        world.now += 40.0
        assert stalled(world.state, world.now, stall_s=30.0) is None
    assign_as_dask(world.state, world.now)
    assert world.decide() == [] and not world.state.placed
    assert "needs 50 bytes on a device, and its has 20" in explain(world.state, "a0", world.now)
    join(world, "large", "h100", 70)
    assert warmed(world.decide()) == {"large"}
    world.warm("large")
    assert assigned(world.decide()) == [("a0", "large")]
    world.park(1, B)
    assert warmed(world.decide()) == {"small"}  # which is free, for what fits there


def test_a_pool_that_does_not_say_may_be_large_enough_until_its_workers_say_no(world):
    world.tell(PoolsDeclared({**POOLS, "other": None}), ContextDeclared("a", "large", 144))
    world.park(1)
    assert failed(world.decide()) == []
    join(world, "w", "other")
    assert warmed(world.decide()) == {"w"}
    world.tell(ResidencyReported("w", "b", Tier.DEVICE, device_bytes=100))
    world.now += 10.0
    (error,) = failed(world.decide())
    assert "pool 'other' 100" in error


def test_a_size_that_is_not_known_is_refused_nowhere():
    world = World()
    world.tell(PoolsDeclared(POOLS), ContextDeclared("a", "a"))
    world.park(1)
    assert failed(world.decide()) == []
    join(world, "w", "a10", 20)
    assert any(isinstance(action, Load) for action in world.decide())


def test_work_that_is_restricted_to_workers_does_not_wait_for_pools(world):
    join(world, "small", "a10", 20)
    world.park(1, Group(("a",), "infer", allowed=frozenset({"small"})))
    (error,) = failed(world.decide())
    assert "the largest device has 20 for contexts (1 workers checked" in error


def test_workers_of_no_pool_count_as_well(world):
    world.tell(ContextDeclared("a", "large", 144))
    join(world, "w", "elsewhere", 200)
    world.park(1)
    assert warmed(world.decide()) == {"w"}
    world.tell(ContextDeclared("b", "b", 300))
    world.park(1, B)
    (error,) = failed(world.decide())
    assert error.startswith("'b' needs 300") and "other workers 200" in error


def test_workers_are_wanted_of_pools_that_the_work_fits(world):
    offers = {"a10": Offer(8), "h100": Offer(4)}
    assert spread(world.state, 2, offers, 0.0) == {"a10": 2, "h100": 0}
    world.tell(RunReported("run", A, 100.0, 8))
    assert spread(world.state, 6, offers, 0.0) == {"a10": 0, "h100": 4}
    # With work that fits on both, first those that can do all of it.
    world.tell(RunReported("other", B, 100.0, 8))
    assert spread(world.state, 6, offers, 0.0) == {"a10": 2, "h100": 4}
