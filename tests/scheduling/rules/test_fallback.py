from __future__ import annotations

from dask_pcm.scheduling.events import WorkEnded, WorkerDraining, WorkerPaused
from dask_pcm.scheduling.rules.fallback import assign_as_dask, stalled
from dask_pcm.scheduling.rules.placement import Placement
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, B, World, assigned, warmed

STALL_S = 30.0


def idle(world, seconds):
    """Nobody decides anything for so long."""
    world.now += seconds
    return stalled(world.state, world.now, STALL_S)


def test_work_that_waits_for_idle_workers_has_stalled():
    world = World("w0", "w1")
    world.park(3)
    assert idle(world, 29.0) is None
    assert idle(world, 2.0) == "a0"


def test_a_worker_that_runs_or_loads_is_not_stalled():
    world = World("w0")
    world.park(3)
    world.decide()
    assert idle(world, 1000.0) is None  # it loads
    world.warm("w0")
    world.decide()
    assert idle(world, 1000.0) is None  # it works
    world.tell(WorkEnded("a0", True), WorkEnded("a1", True))
    assert idle(world, 31.0) == "a2"


def test_a_worker_that_makes_room_once_answers_have_ended_is_not_stalled():
    world = World("w0")
    world.park(3)
    view = world.state.workers["w0"]
    view.evicting["answering"] = A
    view.n_asked["answering"] = 1
    assert idle(world, 1000.0) is None
    del view.n_asked["answering"]
    assert idle(world, 0.0) == "a0"


def test_without_usable_workers_nothing_has_stalled():
    world = World("w0", "w1")
    world.tell(WorkerPaused("w0", True), WorkerDraining("w1", 5.0))
    world.park(1)
    assert idle(world, 1000.0) is None
    assert stalled(World().state, 1e9, STALL_S) is None


def test_then_idle_workers_are_given_what_waits_warm_or_not():
    world = World("w0", "w1")
    world.warm("w0")
    world.park(3)
    world.state.plans.actions = []
    assign_as_dask(world.state, world.now)
    assert assigned(world.state.plans.actions) == [("a0", "w0"), ("a1", "w1")]
    assert warmed(world.state.plans.actions) == {"w1"}
    world.state.validate()
    assert world.state.ahead.peek(A).key == "a2"


def test_what_others_do_hides_no_stall():
    world = World("w0", "w1")
    world.warm("w0", "b")
    world.park(100, B)
    world.park(1)
    world.state.workers["w1"].tiers["a"] = Tier.FAILED
    for _ in range(40):
        world.state.plans.forecasts.clear()
        Placement(world.state, world.now, 0.05).assign([world.state.workers["w0"]])
        world.now += 1.0
        world.tell(*(WorkEnded(key, True) for key in list(world.state.placed)))
    assert stalled(world.state, world.now, STALL_S) == "a0"
