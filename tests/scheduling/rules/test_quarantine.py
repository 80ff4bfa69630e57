"""Quarantine of nodes on which everything fails."""

from __future__ import annotations

from itertools import pairwise

from dask_pcm.scheduling.actions import Fail, Quarantine
from dask_pcm.scheduling.events import Group, ResidencyReported, RunReported, WorkerJoined
from dask_pcm.scheduling.learned.failures import DEVICE
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, World, warmed


def on_nodes(**n_workers):
    world = World()
    for node, n in n_workers.items():
        world.tell(*(WorkerJoined(f"{node}-{i}", 2, None, node) for i in range(n)))
    return world


def fail(world, worker, kind=DEVICE, error="the driver 470 is too old for CUDA 13", context="a"):
    world.tell(ResidencyReported(worker, context, Tier.FAILED, seconds=0.1, error=error, kind=kind))


def quarantined(actions):
    return [action.host for action in actions if isinstance(action, Quarantine)]


def test_an_unusable_device_quarantines_only_its_node():
    world = on_nodes(broken=4, well=1)
    world.tell(RunReported("run", A, 1000.0, 10))
    assert len(warmed(world.decide())) == 5
    fail(world, "broken-0")
    assert quarantined(world.decide()) == ["broken"]
    assert world.state.failures.of_context == {}
    world.warm("well-0")
    world.park(5)
    assert not warmed(world.decide())
    assert "driver 470" in world.state.failures.quarantined["broken"].error


def test_a_node_is_retried_and_each_quarantine_is_longer():
    world = on_nodes(broken=1, well=1)
    world.tell(RunReported("run", A, 1e6, 10))
    world.warm("well-0", seconds=1.0)
    world.learn(A, "well-0", 1.0)
    waits = []
    for _ in range(4):
        assert warmed(world.decide()) == {"broken-0"}
        fail(world, "broken-0")
        (action,) = [a for a in world.decide() if isinstance(a, Quarantine)]
        waits.append(action.seconds)
        world.now += action.seconds - 0.1
        assert not warmed(world.decide())
        world.now += 0.2
    assert waits == [10.0, 20.0, 40.0, 80.0]
    assert warmed(world.decide()) == {"broken-0"}
    world.warm("broken-0")
    assert world.state.failures.n_quarantines == {}


def test_a_node_where_only_one_context_fails_is_not_broken():
    world = on_nodes(node=2)
    world.warm("node-0", "b", seconds=1.0)
    world.park(2)
    world.decide()
    fail(world, "node-1", kind="OSError", error="no such file")
    assert quarantined(world.decide()) == []


def test_a_context_that_loads_elsewhere_incriminates_the_node():
    world = on_nodes(broken=2, well=1)
    world.warm("well-0", seconds=1.0)
    world.tell(RunReported("run", A, 1e6, 10))
    world.learn(A, "well-0", 1.0)
    world.decide()
    fail(world, "broken-0", kind="OSError", error="disk full")
    assert quarantined(world.decide()) == ["broken"]


def test_a_context_that_never_loaded_does_not_incriminate_the_node():
    world = on_nodes(one=1, two=1)
    world.park(3)
    world.decide()
    fail(world, "one-0", kind="OSError", error="no weights")
    assert quarantined(world.decide()) == []


def test_broken_nodes_that_come_first_do_not_end_the_work():
    world = on_nodes(a=1, b=1, c=1, d=1)
    world.park(50)
    world.decide()
    for node in "abcd":
        fail(world, f"{node}-0")
    actions = world.decide()
    assert sorted(quarantined(actions)) == ["a", "b", "c", "d"]
    assert not any(isinstance(action, Fail) for action in actions)
    world.tell(WorkerJoined("well-0", 2, None, "well"))
    assert warmed(world.decide()) == {"well-0"}


def test_without_usable_nodes_work_fails_with_the_error_of_each():
    world = on_nodes(a=1, b=1)
    world.park(2)
    failed = []
    for _ in range(3):
        world.now += 100.0
        world.decide()
        for node in "ab":
            fail(world, f"{node}-0", error=f"node {node}: torch was built without CUDA")
        failed += [action for action in world.decide() if isinstance(action, Fail)]
    world.now += 1.0
    failed += [action for action in world.decide() if isinstance(action, Fail)]
    assert {action.key for action in failed} == {"a0", "a1"}
    end = failed[0]
    assert "node a: torch was built" in end.error and "node b" in end.error
    world.park(1)  # a new request allows new attempts
    assert warmed(world.decide())


def test_no_unit_is_assigned_to_a_quarantined_node():
    world = on_nodes(broken=2)
    world.tell(ResidencyReported("broken-0", "b", Tier.LOADING))
    world.tell(Quarantine("broken", 10.0, "no driver"))
    world.warm("broken-0", "a")  # its load was in flight
    world.park(1)
    assert [
        a for a in world.decide() if not isinstance(a, Quarantine)
    ] != []  # a node that loads is not broken


def test_groups_of_other_contexts_avoid_a_quarantined_node():
    world = on_nodes(broken=1)
    other = Group(("z",), "infer")
    world.park(1)
    world.decide()
    fail(world, "broken-0")
    world.decide()
    world.park(1, other)
    assert not warmed(world.decide())


def test_a_worker_that_failed_before_the_first_load_retries_after_a_back_off():
    world = on_nodes(one=1, two=1)
    world.tell(RunReported("run", A, 1e6, 10))
    world.decide()
    fail(world, "one-0", kind="OSError", error="the store hiccups")
    world.warm("two-0", seconds=1.0)
    world.learn(A, "two-0", 1.0)
    world.now += 5.0
    assert not warmed(world.decide())
    world.now += 6.0
    assert warmed(world.decide()) == {"one-0"}


def test_one_bad_device_beside_good_ones_retries_after_a_back_off():
    world = on_nodes(node=2)
    world.tell(RunReported("run", A, 1e6, 10))
    world.decide()
    world.warm("node-0", seconds=1.0)
    world.learn(A, "node-0", 1.0)
    fail(world, "node-1")
    tried_at = []
    for _ in range(100):
        for worker in warmed(world.decide()):
            tried_at.append(world.now)
            fail(world, worker)
        world.now += 1.0
    waits = [later - before for before, later in pairwise(tried_at)]
    assert len(tried_at) >= 2 and waits == sorted(waits)


def test_a_failed_node_does_not_keep_other_workers_cold():
    world = on_nodes(failed=1, slow=1, fast=1)
    world.warm("fast-0", seconds=1.0)
    world.learn(A, "fast-0", 1.0)
    world.tell(ResidencyReported("failed-0", "a", Tier.DEVICE, seconds=1.0))
    world.tell(ResidencyReported("failed-0", "a", Tier.ABSENT))
    world.state.failures.of_context["a"] = [("failed", "OSError")]
    busy = Group(("z",), "infer")
    world.warm("slow-0", "z")
    world.learn(busy, "slow-0", 5000.0)
    world.park(1, busy)
    world.decide()
    world.tell(RunReported("run", A, 1000.0, 10))
    assert "failed-0" in warmed(world.decide())


def test_a_device_that_fails_beside_a_warm_context_is_given_up():
    """It backs off as others do, and after the last attempt the work fails."""
    world = on_nodes(one=1, two=1)
    for worker in ("one-0", "two-0"):
        world.warm(worker, "b", seconds=1.0)
    world.park(2)
    tried_at, ended = {"one-0": [], "two-0": []}, []
    while not ended and world.now < 200.0:
        actions = world.decide()
        for worker in warmed(actions):
            tried_at[worker].append(world.now)
            fail(world, worker, error=f"{worker}: the driver 470 is too old")
        ended = [action for action in world.decide() if isinstance(action, Fail)]
        world.now += 0.25
    assert {action.key for action in ended} == {"a0", "a1"}
    assert "one-0: the driver 470" in ended[0].error and "two-0: the driver" in ended[0].error
    for times in tried_at.values():
        assert len(times) == 3
        assert [later - before for before, later in pairwise(times)] == [10.0, 20.0]
    world.park(1, start=5)  # a new request allows new attempts
    assert warmed(world.decide())


def test_work_fails_beside_a_quarantined_node_too():
    world = on_nodes(broken=1, mixed=1)
    world.warm("mixed-0", "b", seconds=1.0)
    world.park(2)
    ended = []
    while not ended and world.now < 300.0:
        for worker in warmed(world.decide()):
            fail(world, worker, error=f"{worker}: no driver")
        ended = [action for action in world.decide() if isinstance(action, Fail)]
        world.now += 0.25
    assert ended and "broken-0: no driver" in ended[0].error and "mixed-0" in ended[0].error


def test_work_restricted_to_a_broken_node_fails_though_others_work():
    world = on_nodes(broken=1, well=1)
    world.warm("broken-0", "b", seconds=1.0)
    bound = Group(("a",), "infer", frozenset({"broken-0"}))
    world.park(1, bound)
    ended = []
    while not ended and world.now < 100.0:
        for worker in warmed(world.decide()):
            fail(world, worker)
        ended = [action for action in world.decide() if isinstance(action, Fail)]
        world.now += 0.25
    assert ended and 30.0 <= world.now < 32.0


def test_a_successful_load_resets_the_back_off():
    world = on_nodes(node=1)
    world.warm("node-0", "b", seconds=1.0)
    world.tell(RunReported("run", A, 1e6, 10))
    assert warmed(world.decide())
    fail(world, "node-0")
    world.now += 11.0
    assert warmed(world.decide())
    world.warm("node-0", "a")
    assert not world.state.failures.of_device and not world.state.failures.n_back_offs
