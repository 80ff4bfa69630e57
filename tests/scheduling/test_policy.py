"""The gate's decisions, played without a cluster: time is a number."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from dask_pcm.scheduling.actions import Fail, Load, LoadsGivenUp
from dask_pcm.scheduling.events import (
    ContextDeclared,
    Group,
    ProcessEnded,
    ResidencyReported,
    Restarted,
    RunClosed,
    RunReported,
    Work,
    WorkEnded,
    WorkerJoined,
    WorkerLeft,
    WorkerPaused,
    WorkParked,
    WorkWithdrawn,
)
from dask_pcm.scheduling.policy import decide
from dask_pcm.scheduling.rules.drain_time import drain_s
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, B, World, assigned, warmed


def test_first_work_warms_a_worker_for_each_piece():
    world = World("w0", "w1", "w2")
    world.park(2)
    actions = world.decide()
    assert len(warmed(actions)) == 2
    assert not assigned(actions)
    assert world.decide() == []


def test_more_work_warms_more_workers_while_the_first_still_load():
    world = World("w0", "w1", "w2")
    world.park(1)
    assert len(warmed(world.decide())) == 1
    world.park(1, start=1)
    assert len(warmed(world.decide())) == 1
    assert world.decide() == []


def test_a_worker_that_hangs_is_not_waited_for():
    world = World("fast", "slow", n_lanes=1)
    for worker, row_s in (("fast", 1.0), ("slow", 10.0)):
        world.warm(worker)
        world.learn(A, worker, row_s)
    world.park(2)
    assert assigned(world.decide()) == [("a0", "fast")]
    world.now = 5.0  # four seconds overdue: the slow one might still be later
    assert assigned(world.decide()) == []
    world.now = 12.0
    assert assigned(world.decide()) == [("a1", "slow")]


def test_nothing_runs_where_its_context_is_not_warm():
    world = World("w0", "w1")
    world.park(4)
    world.decide()
    world.warm("w1")
    assert {worker for _, worker in assigned(world.decide())} == {"w1"}


def test_each_lane_gets_work_before_anything_is_known():
    world = World("w0", n_lanes=2)
    world.park(5)
    world.decide()
    world.warm("w0")
    assert len(assigned(world.decide())) == 2


def test_the_pipeline_counts_seconds_and_not_tasks():
    world = World("w0")
    world.warm("w0")
    world.learn(A, "w0", 0.001)
    world.park(500)
    n_short = len(assigned(world.decide(pipeline_s=0.05)))
    assert 45 <= n_short <= 55

    world = World("w0")
    world.warm("w0")
    world.learn(A, "w0", 10.0)
    world.park(500)
    assert len(assigned(world.decide(pipeline_s=0.05))) == 2


def test_a_cold_worker_is_not_warmed_if_that_does_not_pay():
    world = World("w0", "w1", "w2", "w3")
    world.warm("w0", seconds=2.0)
    world.warm("w1")
    world.learn(A, "w0", 0.1)
    world.learn(A, "w1", 0.1)
    world.park(38)  # 1.9 s of work for two, and a load takes 2 s
    assert not warmed(world.decide())


def test_more_workers_are_warmed_where_it_pays():
    world = World("w0", "w1", "w2", "w3")
    world.warm("w0", seconds=2.0)
    world.warm("w1")
    world.learn(A, "w0", 0.1)
    world.learn(A, "w1", 0.1)
    world.park(160)
    assert warmed(world.decide()) == {"w2", "w3"}


def test_a_load_under_way_counts_with_what_is_left_of_it():
    world = World("w0", "w1")
    world.warm("w0", seconds=10.0)
    world.learn(A, "w0", 1.0)
    world.park(30)
    assert warmed(world.decide()) == {"w1"}
    world.now = 5.0
    assert not warmed(world.decide())


def test_what_a_run_will_submit_counts_as_work():
    world = World("w0", "w1")
    world.tell(RunReported("run", A, 1000.0, 2))
    assert warmed(world.decide()) == {"w0", "w1"}
    world.tell(RunClosed("run"))
    assert world.state.ahead.groups() == []


def test_a_first_unit_that_takes_long_is_not_waited_for_for_ever():
    world = World("w0", "w1")
    world.warm("w0", seconds=1.0)
    world.park(10)
    world.decide()
    assert not warmed(world.decide())
    world.now = 30.0  # the first is still at it: a row takes at least 15 s
    assert warmed(world.decide()) == {"w1"}


@pytest.mark.parametrize("is_known", [False, True])
def test_work_does_not_wait_for_a_warm_worker_that_is_busy_with_work_of_unknown_cost(is_known):
    """For instance with the first units of a run, which may take minutes."""
    world = World("busy", "idle")
    for context in "ab":
        world.warm("busy", context, seconds=0.1)
    world.park(2, B)
    assert {worker for _, worker in assigned(world.decide())} == {"busy"}
    if is_known:
        world.learn(A, "busy", 0.05)
    world.park(1, A)
    assert not warmed(world.decide())  # they may end at once
    world.now = 3.0
    assert warmed(world.decide()) == {"idle"}
    assert world.state.estimates.backlog_s(world.state.workers["busy"], 3.0) == 3.0


def test_a_slow_worker_leaves_the_last_piece_to_a_fast_one():
    world = World("fast", "slow", n_lanes=1)
    for worker, row_s in (("fast", 1.0), ("slow", 10.0)):
        world.warm(worker)
        world.learn(A, worker, row_s)
    world.park(3)
    assert assigned(world.decide()) == [("a0", "fast")]
    world.park(40, start=3)
    assert ("a1", "slow") in assigned(world.decide())


def test_urgent_work_goes_first_in_any_context():
    world = World("w0", n_lanes=1)
    world.warm("w0", "a")
    world.warm("w0", "b")
    world.park(2, A, priority=(5,))
    world.park(2, B, priority=(1,))
    assert assigned(world.decide()) == [("b0", "w0")]


def test_work_that_needs_two_contexts_goes_where_both_are():
    both = Group(("a", "b"), "infer")
    world = World("w0", "w1")
    world.warm("w0", "a")
    world.warm("w1", "a")
    world.warm("w1", "b")
    world.tell(WorkParked(Work("k", both, (0,))))
    assert assigned(world.decide()) == [("k", "w1")]


def test_restricted_work_stays_where_it_may():
    world = World("w0", "w1")
    only = Group(("a",), "infer", frozenset({"w1", "gone"}))
    world.warm("w0")
    world.tell(WorkParked(Work("k", only, (0,))))
    actions = world.decide()
    assert warmed(actions) == {"w1"}
    assert not assigned(actions)


def test_a_paused_worker_gets_nothing():
    world = World("w0")
    world.warm("w0")
    world.tell(WorkerPaused("w0", True))
    world.park(1)
    assert world.decide() == []
    world.tell(WorkerPaused("w0", False))
    assert assigned(world.decide()) == [("a0", "w0")]


def fail_loads(world, n, **options):
    """Every load that is asked for fails, `n` times; the workers that were asked."""
    asked = []
    for attempt in range(n):
        (worker,) = warmed(world.decide(**options))
        asked.append(worker)
        report = ResidencyReported(
            worker, "a", Tier.FAILED, seconds=0.1, error=f"no weights ({attempt})"
        )
        world.tell(report)
    return asked


def test_a_failed_load_is_tried_elsewhere_and_then_given_up_with_its_error():
    world = World("w0", "w1", "w2", "w3")
    world.park(1)
    assert len(set(fail_loads(world, 3))) == 3
    assert world.decide() == [Fail("a0", "a", "no weights (2)"), LoadsGivenUp("a")]
    assert not world.state.ahead.waiting.works
    assert world.decide() == []
    world.park(1)  # asked for again, it is tried again
    assert len(warmed(world.decide())) == 1


def test_a_single_worker_retries_before_the_context_is_given_up():
    world = World("w0")
    world.park(1)
    assert fail_loads(world, 3) == ["w0"] * 3
    assert Fail("a0", "a", "no weights (2)") in world.decide()


def test_one_old_failure_does_not_end_the_work_when_the_others_leave():
    world = World("w0", "w1")
    world.park(4)
    world.decide()
    world.tell(ResidencyReported("w0", "a", Tier.FAILED, seconds=0.1, error="busy"))
    world.warm("w1")
    assert assigned(world.decide())
    world.tell(WorkerLeft("w1"))
    actions = world.decide()
    assert warmed(actions) == {"w0"} and not any(isinstance(a, Fail) for a in actions)


def test_while_a_run_is_open_what_was_given_up_is_not_loaded_again():
    world = World("w0")
    world.tell(RunReported("run", A, 100.0, 1))
    world.park(1)
    fail_loads(world, 3)
    assert Fail("a0", "a", "no weights (2)") in world.decide()
    world.park(2, start=1)  # the run's driver has not noticed yet
    assert {a.key for a in world.decide() if isinstance(a, Fail)} == {"a1", "a2"}
    world.tell(RunReported("run", A, 90.0, 1))
    assert world.decide() in ([], [LoadsGivenUp("a")])
    world.tell(RunClosed("run"), RunReported("next", A, 90.0, 1))
    assert len(warmed(world.decide())) == 1


def test_two_contexts_that_no_worker_can_have_together_are_given_up():
    both = Group(("a", "b"), "infer")
    world = World("w0", "w1")
    world.tell(WorkParked(Work("k", both, (0,))), WorkParked(Work("l", both, (1,))))
    actions = []
    for _ in range(8):
        for worker in warmed(actions := world.decide()) or ("w0", "w1"):
            good, bad = ("a", "b") if worker == "w0" else ("b", "a")
            world.warm(worker, good)
            world.tell(ResidencyReported(worker, bad, Tier.FAILED, seconds=0.1, error=f"no {bad}"))
        if not world.state.ahead.waiting.works:
            break
    assert {action.key for action in actions if isinstance(action, Fail)} == {"k", "l"}


def fail_on(world, nodes, kinds=("OSError",)):
    """Have loads fail on some nodes until nothing more is tried; where, and what was failed."""
    tried, failed = [], []
    for n in range(40):
        actions = world.decide()
        failed += [action.key for action in actions if isinstance(action, Fail)]
        warms = [action for action in actions if isinstance(action, Load)]
        for warm in warms:
            node = world.state.workers[warm.worker].host
            tried.append(node)
            if node in nodes:
                kind = kinds[n % len(kinds)]
                report = ResidencyReported(
                    warm.worker, "a", Tier.FAILED, seconds=0.1, error="no driver", kind=kind
                )
                world.tell(report)
            else:
                world.warm(warm.worker)
        world.now += 1.0
    return tried, failed


def on_nodes(**n_workers):
    world = World()
    for node, n in n_workers.items():
        world.tell(*(WorkerJoined(f"{node}{i}", 2, None, node) for i in range(n)))
    world.park(1)
    return world


def test_a_node_on_which_all_fails_does_not_end_the_work_of_others():
    tried, failed = fail_on(on_nodes(broken=8, well=1), {"broken"})
    assert not failed
    assert tried.index("well") <= 1


def test_what_fails_the_same_way_on_three_nodes_ends():
    nodes = {"one": 2, "two": 2, "three": 2, "four": 2}
    tried, failed = fail_on(on_nodes(**nodes), set(nodes))
    assert failed == ["a0"]
    assert len(tried) == len(set(tried)) == 3


def test_what_fails_otherwise_each_time_is_tried_longer_but_not_for_ever():
    nodes = {"one": 2, "two": 2, "three": 2, "four": 2}
    kinds = [f"Error{n}" for n in range(40)]
    tried, failed = fail_on(on_nodes(**nodes), set(nodes), kinds)
    assert failed == ["a0"]
    assert len(tried) == 9


def end_processes(world, nodes):
    """Have each worker that loads end, and one come back on the node it was on, if on any."""
    n_ended, failed = 0, []
    for _ in range(30):
        actions = world.decide()
        failed += [action for action in actions if isinstance(action, Fail)]
        for warm in [action for action in actions if isinstance(action, Load)]:
            n_ended += 1
            node = world.state.workers[warm.worker].host
            world.tell(ResidencyReported(warm.worker, warm.context, Tier.LOADING))
            world.tell(WorkerLeft(warm.worker))
            successor, there = f"{node}-{n_ended}", nodes(node, n_ended)
            world.tell(WorkerJoined(successor, 2, None, there))
            if there == node:
                world.tell(ProcessEnded(successor, there, (warm.context,)))
        world.now += 1.0
    return n_ended, failed


def test_a_loader_that_ends_its_process_is_not_tried_for_ever():
    world = on_nodes(one=1)
    n_ended, (fail,) = end_processes(world, lambda node, n: node)
    assert n_ended == 3
    assert "process ended while it loaded" in fail.error


def test_what_had_not_begun_to_load_is_not_to_blame():
    """Two contexts are wanted of a worker; one ends its process each time."""
    world = on_nodes(one=1)
    world.park(1, group=B)
    failed = []
    for n in range(30):
        actions = world.decide()
        failed += [action.key for action in actions if isinstance(action, Fail)]
        wanted = [action for action in actions if isinstance(action, Load)]
        if not wanted:
            continue
        worker = wanted[0].worker
        if "a" in {warm.context for warm in wanted}:
            world.tell(ResidencyReported(worker, "a", Tier.LOADING))
            world.tell(WorkerLeft(worker), WorkerJoined(f"w-{n}", 2, None, "one"))
            world.tell(ProcessEnded(f"w-{n}", "one", ("a",)))
        else:
            world.tell(ResidencyReported(worker, "b", Tier.LOADING))
            world.tell(ResidencyReported(worker, "b", Tier.DEVICE, seconds=1.0))
            break
    assert failed == ["a0"]
    assert assigned(world.decide()) == [("b0", worker)]


def test_what_has_been_loaded_before_does_not_end_its_processes_so_soon():
    """Somebody kills workers, again and again in the midst of a load."""
    world = on_nodes(one=1)
    world.warm("one0", seconds=1.0)
    world.tell(WorkerLeft("one0"), WorkerJoined("one0", 2, None, "one"))
    n_ended, (fail,) = end_processes(world, lambda node, n: node)
    assert n_ended == 9  # but it is not tried for ever
    assert "process ended while it loaded" in fail.error


def test_loads_ended_by_a_restart_are_no_failures():
    world = on_nodes(one=1)
    for n in range(10):
        (warm,) = [action for action in world.decide() if isinstance(action, Load)]
        world.tell(ResidencyReported(warm.worker, warm.context, Tier.LOADING))
        world.tell(Restarted())
        assert not world.state.workers[warm.worker].begun  # nothing to attribute the loss to
        world.tell(WorkerLeft(warm.worker))
        world.tell(WorkerJoined(f"w-{n}", 2, None, "one"))
    assert not world.state.failures.of_context


def test_what_is_said_last_of_a_size_counts_until_it_is_measured():
    state = GateState()
    for n_bytes in (40, 4):
        state.apply(ContextDeclared("a", "a", n_bytes), 0.0)
    assert state.contexts.sizes == {"a": 4}
    state.apply(WorkerJoined("w", 2), 0.0)
    state.apply(ResidencyReported("w", "a", Tier.DEVICE, seconds=1.0, n_bytes=6), 0.0)
    state.apply(ContextDeclared("a", "a", 5), 0.0)
    assert state.contexts.sizes == {"a": 6}


def test_loads_lost_with_their_nodes_are_no_failures():
    world = on_nodes(one=1)
    n_ended, failed = end_processes(world, lambda node, n: f"node-{n}")
    assert n_ended == 30 and not failed


def test_a_failed_load_does_no_harm_where_another_worker_is_warm():
    world = World("w0", "w1")
    world.warm("w0")
    world.tell(ResidencyReported("w1", "a", Tier.FAILED, seconds=0.1, error="no memory"))
    world.park(3)
    assert {worker for _, worker in assigned(world.decide())} == {"w0"}


def test_before_speeds_are_known_each_worker_gets_one_piece_first():
    world = World("w0", "w1", "w2", "w3")
    for worker in ("w0", "w1", "w2", "w3"):
        world.warm(worker)
    world.park(6)
    got = [worker for _, worker in assigned(world.decide())]
    assert sorted(got[:4]) == ["w0", "w1", "w2", "w3"]
    assert len(got) == 6


def test_learns_row_times_from_finishes_that_arrive_together():
    world = World("w0")
    world.warm("w0")
    world.park(100)
    world.decide()
    for round_number in range(1, 20):
        world.now = round_number * 0.4
        done = list(world.state.placed)
        world.tell(*(WorkEnded(key, is_finished=True) for key in done))
        n_done = len(done)
        world.decide()
        if not world.state.ahead.waiting.works:
            break
    assert n_done
    learned = world.state.estimates.cost.row_s(A.costs, "w0")
    assert learned == pytest.approx(0.4 / 2, rel=0.5)


def test_what_was_begun_before_tells_nothing_of_costs():
    """Most of it is in its journal: it ends in no time."""
    world = World("w0", n_lanes=1)
    world.warm("w0")
    world.learn(A, "w0", 1.0)
    world.tell(WorkParked(Work("again", A, (0,), 100.0, is_again=True)))
    world.decide()
    world.now += 0.5
    world.tell(WorkEnded("again", is_finished=True))
    world.park(1)
    world.decide()
    assert world.state.estimates.cost.row_s(A.costs, "w0") == pytest.approx(1.0)
    assert world.state.workers["w0"].busy_since == world.now


def test_lanes_that_take_turns_are_both_nearly_done():
    """Two pieces of 10 s at once: when the first ends after 20 s, so does the second."""
    world = World("w0", n_lanes=2)
    world.warm("w0")
    world.learn(A, "w0", 1.0)
    world.park(2, n_rows=10.0)
    world.decide()
    view = world.state.workers["w0"]
    assert world.state.estimates.backlog_s(view, world.now) == pytest.approx(20.0)
    world.now = 19.0
    world.tell(WorkEnded("a0", is_finished=True))
    world.decide()
    assert world.state.estimates.backlog_s(view, world.now) < 5.0


def test_what_a_run_has_submitted_is_not_expected_twice():
    world = World()
    world.tell(RunReported("run", A, 100.0, 5))
    world.park(3, n_rows=20.0)
    assert world.state.ahead.n_rows(A) == 100.0
    world.park(1, n_rows=20.0)  # the same again: it came back
    assert world.state.ahead.n_rows(A) == 100.0


def test_a_lost_worker_gives_its_work_back():
    world = World("w0", "w1")
    world.warm("w0")
    world.park(1)
    world.decide()
    world.tell(WorkerLeft("w0"))
    world.park(1)  # Dask parks it again
    assert warmed(world.decide()) == {"w1"}


def test_drain_is_exact():
    assert drain_s(10, [(0, 1), (4, 1)]) == 7
    assert drain_s(2, [(0, 1), (4, 1)]) == 2
    assert drain_s(0, [(3, 1)]) == 3
    assert drain_s(5, []) == float("inf")


def n_calls(function):
    """Calls of Python functions, and turns of generators, that a call makes."""
    counted = Counter()
    sys.setprofile(lambda frame, event, argument: counted.update([event]))
    try:
        function()
    finally:
        sys.setprofile(None)
    return counted["call"]


def n_calls_to_decide(n_contexts, device_bytes):
    """Where as many contexts have come and gone, and as many have work that waits."""
    world = World(*(f"w{i}" for i in range(4)))
    for i in range(n_contexts):
        name, group = f"c{i}", Group((f"c{i}",), "infer")
        world.tell(ContextDeclared(name, name, 10))
        for worker, view in world.state.workers.items():
            view.device_bytes = device_bytes
            world.warm(worker, name, seconds=1.0)
            world.tell(ResidencyReported(worker, name, [Tier.ABSENT, Tier.HOST][i % 2]))
        world.park(1, group)
        world.learn(group, "w0", 1.0)
    return n_calls(lambda: decide(world.state, 1.0)) + n_calls(lambda: decide(world.state, 2.0))


@pytest.mark.parametrize("device_bytes", [None, 20, 500, 1_000_000])
def test_what_a_decision_takes_grows_no_faster_than_contexts(device_bytes):
    few, many = (n_calls_to_decide(n, device_bytes) for n in (100, 400))
    assert many < 5 * few


def test_what_is_cold_on_a_worker_is_forgotten():
    world = World("w0")
    world.warm("w0")
    world.tell(ResidencyReported("w0", "a", Tier.ABSENT))
    assert not world.state.workers["w0"].tiers


def test_sizes_that_become_known_count_at_once():
    world = World("w0", "w1")
    world.state.workers["w0"].device_bytes = 100
    world.warm("w0", "a")
    world.tell(ContextDeclared("a", "a", 10), ContextDeclared("a", "a", 20))
    assert world.state.workers["w0"].free_bytes == 80
    world.tell(ResidencyReported("w1", "a", Tier.DEVICE, n_bytes=30))
    assert world.state.workers["w0"].free_bytes == 70
    world.state.validate()


def test_work_that_was_withdrawn_and_came_again_fails_once():
    world = World("w0")
    world.park(2)
    world.tell(WorkWithdrawn("a0"))
    world.park(1)
    for _ in range(3):
        world.decide()
        world.tell(ResidencyReported("w0", "a", Tier.FAILED, error="no weights"))
    failed = [action.key for action in world.decide() if isinstance(action, Fail)]
    assert sorted(failed) == ["a0", "a1"]
