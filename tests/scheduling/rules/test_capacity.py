"""Room on a worker: lanes for functions, rows for what serves many at a time."""

from __future__ import annotations

from dask_pcm.scheduling.events import (
    Group,
    ResidencyReported,
    Work,
    WorkEnded,
    WorkerJoined,
    WorkerLeft,
    WorkHandedOver,
    WorkParked,
    WorkRejoined,
)
from dask_pcm.scheduling.explain import explain
from dask_pcm.scheduling.state.worker import select_begun
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, B, World, assigned

SUSPECT = Group(("a",), "infer", is_isolated=True)


def warm_world(n_lanes=1, n_rows=0):
    world = World("w", n_lanes=n_lanes)
    world.tell(ResidencyReported("w", "a", Tier.DEVICE, seconds=1.0, n_rows=n_rows))
    return world


def keys(world):
    return [key for key, _ in assigned(world.decide(pipeline_s=0.0))]


def test_served_work_frees_its_lane_until_the_rows_are_full():
    world = warm_world(n_rows=25)
    world.park(5, n_rows=10.0)
    assert keys(world) == ["a0"]
    for number in (0, 1):
        world.tell(WorkHandedOver(f"a{number}", n_rows=10.0))
        assert keys(world) == [f"a{number + 1}"]
    world.tell(WorkHandedOver("a2", n_rows=10.0))
    assert keys(world) == []  # 30 rows are in flight
    world.tell(WorkEnded("a1", True))
    assert keys(world) == ["a3"]


def test_a_large_piece_lets_in_the_next_once_its_last_rows_are_served():
    world = warm_world(n_lanes=2, n_rows=100)
    world.park(3, n_rows=400.0)
    assert keys(world) == ["a0"] and keys(world) == []
    world.tell(WorkHandedOver("a0", n_rows=60.0))
    assert keys(world) == ["a1"] and keys(world) == []


def test_other_contexts_have_the_lanes_while_the_rows_of_one_are_full():
    world = warm_world(n_rows=5)
    world.warm("w", "b")
    world.park(2, n_rows=10.0)
    assert keys(world) == ["a0"]
    world.tell(WorkHandedOver("a0", n_rows=10.0))
    world.park(1, B)
    assert keys(world) == ["b0"]


def test_a_context_that_comes_back_without_an_attendant_has_lanes_only():
    world = warm_world(n_rows=5)
    world.warm("w")
    world.park(3, n_rows=10.0)
    assert keys(world) == ["a0"]
    world.tell(WorkHandedOver("a0", n_rows=10.0))
    assert keys(world) == ["a1"]


def test_what_has_seceded_takes_no_room_and_is_known_until_it_ends():
    world = warm_world()
    world.park(2)
    assert keys(world) == ["a0"]
    world.tell(WorkHandedOver("a0"), WorkHandedOver("a0"))
    view = world.state.workers["w"]
    assert world.state.placed["a0"] == "w" and view.waiting.keys() == {"a0"}
    assert "has seceded" in explain(world.state, "a0", 0.0)
    assert keys(world) == ["a1"]
    # Both had begun: each may be what ends the process.
    works = {key: view.where(key) for key in ("a0", "a1", "a2")}
    assert select_begun(works, {"a0": (0,), "a1": (0,), "a2": (1,)}, 1) == ["a0", "a1"]
    world.now = 2.0
    world.tell(WorkEnded("a1", True))
    world.decide()
    world.now = 5.0
    world.tell(WorkEnded("a0", True))
    world.decide()
    assert "a0" not in world.state.placed and not view.waiting
    assert world.state.estimates.cost.row_s(A.costs, "w", "") is not None


def test_what_has_seceded_is_parked_again_when_its_worker_is_lost():
    world = warm_world()
    world.park(1)
    assert keys(world) == ["a0"]
    world.tell(WorkHandedOver("a0"), WorkerLeft("w"))
    assert not world.state.placed
    world.park(1)
    world.state.validate()


def test_a_suspect_that_has_seceded_lets_in_what_it_waits_for():
    world = warm_world()
    world.tell(WorkParked(Work("bad", SUSPECT, (0,))))
    assert keys(world) == ["bad"]
    world.park(1)
    assert keys(world) == []
    world.tell(WorkHandedOver("bad"))
    assert keys(world) == ["a0"]


def test_a_worker_is_lost_while_it_loads_what_was_not_asked_for():
    world = warm_world()
    world.tell(ResidencyReported("w", "a", Tier.LOADING), WorkerLeft("w"))
    world.state.validate()
    assert not world.state.workers


def test_what_rejoins_has_its_lane_again():
    world = warm_world()
    world.park(3)
    assert keys(world) == ["a0"]
    world.tell(WorkHandedOver("a0"))
    assert keys(world) == ["a1"]
    world.tell(WorkEnded("a1", True), WorkRejoined("a0"), WorkRejoined("a0"))
    view = world.state.workers["w"]
    assert keys(world) == [] and not view.waiting and view.n_on_lanes == 1
    world.tell(WorkHandedOver("a0"))  # and secedes again
    assert keys(world) == ["a2"]
    world.tell(WorkRejoined("a0"))  # beside what it had let in
    assert view.n_on_lanes == 2
    world.tell(WorkEnded("a2", True), WorkEnded("a0", True))
    world.state.validate()
    assert not view.running and not view.rejoined


def test_a_suspect_that_rejoins_is_alone_again():
    world = warm_world()
    world.tell(WorkParked(Work("bad", SUSPECT, (0,))))
    assert keys(world) == ["bad"]
    world.tell(WorkHandedOver("bad"))
    world.park(2)
    assert keys(world) == ["a0"]
    world.tell(WorkRejoined("bad"), WorkEnded("a0", True))
    assert keys(world) == []
    world.state.validate()


def test_a_suspect_is_not_tried_beside_what_waits_for_others():
    world = warm_world()
    world.park(1)
    assert keys(world) == ["a0"]
    world.tell(WorkHandedOver("a0"), WorkParked(Work("bad", SUSPECT, (0,))))
    # There is no other worker, and "a0" may wait for it.
    assert keys(world) == ["bad"]
    view = world.state.workers["w"]
    works = {key: view.where(key) for key in ("a0", "bad")}
    assert select_begun(works, {"a0": (0,), "bad": (1,)}, 2) == ["bad"]  # "a0" only waits
    world.tell(WorkEnded("bad", False))
    world.tell(WorkerJoined("other", 1), ResidencyReported("other", "a", Tier.DEVICE))
    world.tell(WorkParked(Work("worse", SUSPECT, (0,))))
    assert assigned(world.decide(pipeline_s=0.0)) == [("worse", "other")]


def test_a_suspect_that_is_served_stays_alone():
    world = warm_world(n_rows=100)
    world.tell(WorkParked(Work("bad", SUSPECT, (0,))))
    assert keys(world) == ["bad"]
    world.tell(WorkHandedOver("bad", n_rows=10.0))
    world.park(1)
    assert keys(world) == []
