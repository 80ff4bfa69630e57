from __future__ import annotations

import pytest

from dask_pcm.scheduling.actions import Assign, Load, Quarantine
from dask_pcm.scheduling.events import (
    ContextDeclared,
    Group,
    ResidencyReported,
    Work,
    WorkEnded,
    WorkerJoined,
    WorkerPaused,
    WorkParked,
)
from dask_pcm.scheduling.explain import decisions, describe, explain
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, World


def why(world, key="a0"):
    return explain(world.state, key, world.now)


def waits_at(world):
    """Have one piece more than fits wait."""
    world.park(1, start=99, n_rows=1.0, priority=(1,))
    world.decide()
    return why(world, "a99")


def test_without_workers():
    world = World()
    world.park(1)
    world.tell(ContextDeclared("a", "the llm", 10))
    assert "'a0' waits (the only one of its group) for context 'the llm'" in why(world)
    assert "There are no workers" in why(world)


def test_where_it_went_and_why():
    world = World("w")
    world.warm("w")
    world.learn(A, "w", 2.0)
    world.park(1, n_rows=3.0)
    world.decide()
    world.now += 1.0
    text = why(world)
    assert "'a0' is assigned to w, with 0 others" in text
    assert "1 s ago: 'a0' (3 rows) to w: warm, with room, expected to finish in 6 s" in text
    world.tell(WorkEnded("a0", True))
    assert why(world).startswith("1 s ago: 'a0' (3 rows) to w")


def test_nothing_is_known_of_it():
    assert "is not at the gate" in why(World(), "nobody")


def full(world):
    world.warm("w")
    world.learn(A, "w", 2.0)
    world.park(2)
    return "1 worker: warm, busy for about 4 s"


def loading(world):
    return "1 worker: loading, ready in about 0 s"


def paused(world):
    world.tell(WorkerPaused("w", True))
    return "1 worker: paused by Dask"


def quarantined(world):
    world.tell(Quarantine("", 30.0, "CUDA driver 470"))
    return "its node is quarantined for 30 s more; last error: CUDA driver 470"


def too_full(world):
    world.tell(ContextDeclared("b", "the other", 10), ContextDeclared("a", "the llm", 10))
    world.state.workers["w"].device_bytes = 15
    world.warm("w", "b")
    world.park(5, Group(("b",), "infer"))
    world.decide()
    return "needs 10 bytes of its device, 5 are free"


def ends_before(world):
    world.warm("w")
    world.learn(A, "w", 50.0)
    world.tell(WorkerJoined("v", 1))
    world.warm("v")
    world.learn(A, "v", 50.0)
    world.park(1)
    world.state.workers["w"].ends_at = 3.0
    return "1 worker: ends in 3 s, before the work could finish"


def not_allowed(world):
    only = Group(("a",), "infer", frozenset({"gone"}))
    world.tell(WorkParked(Work("a99", only, (1,))))
    world.decide()
    return "1 worker: excluded by the task's worker restrictions"


def failed(world):
    world.tell(WorkerJoined("v", 1))
    world.warm("v")
    world.learn(A, "v", 1.0)
    world.park(4)
    world.state.workers["w"].loading_since["a"] = 0.0
    world.tell(ResidencyReported("w", "a", Tier.FAILED, seconds=0.1, error="no weights"))
    return "failed to load context 'a': no weights"


@pytest.mark.parametrize(
    "happens", [full, loading, paused, quarantined, too_full, ends_before, failed]
)
def test_why_it_waits(happens):
    world = World("w")
    expected = happens(world)
    assert expected in waits_at(world)


def test_why_restricted_work_waits():
    world = World("w")
    expected = not_allowed(world)
    assert expected in why(world, "a99")


def test_why_no_worker_is_warmed_for_it():
    world = World("w", "cold")
    world.warm("w", seconds=60.0)
    world.learn(A, "w", 1.0)
    world.park(5)
    world.decide()
    assert "cold: it would be warm in 60 s, after the other workers have finished (5 s)" in why(
        world, "a4"
    )


def test_a_suspect_says_so():
    world = World("w")
    world.warm("w")
    world.park(2)
    world.decide()
    world.tell(WorkParked(Work("s", Group(("a",), "infer", is_isolated=True), (0,))))
    world.decide()
    assert "It is isolated, because it was running when a worker process died" in why(world, "s")


def test_every_decision_can_be_said_and_the_last_are_kept():
    world = World("w", "v")
    world.park(3)
    world.decide()
    world.warm("w")
    world.decide()
    kinds = {type(decision.action) for decision in world.state.plans.decisions}
    assert kinds == {Load, Assign}
    assert all(len(describe(world.state, d)) > 20 for d in world.state.plans.decisions)
    lines = decisions(world.state, world.now, 2).splitlines()
    assert len(lines) == 2 and "'a1'" in lines[0]
