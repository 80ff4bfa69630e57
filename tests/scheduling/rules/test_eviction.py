"""Eviction between contexts that do not fit together, simulated with a numeric clock."""

from __future__ import annotations

import heapq
import random

import pytest

from dask_pcm.scheduling.actions import (
    Assign,
    Fail,
    Load,
    Offload,
    Vacate,
)
from dask_pcm.scheduling.events import (
    ContextDeclared,
    Group,
    ResidencyReported,
    Work,
    WorkEnded,
    WorkerJoined,
    WorkParked,
)
from dask_pcm.scheduling.policy import decide
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.tiers import Tier


def group(*contexts):
    return Group(contexts, "infer")


class Played:
    """Workers with devices of some bytes; every context takes 10, 2 s to load, 0.5 s to restore."""

    def __init__(self, *device_bytes, load_s=2.0, restore_s=0.5):
        self.state, self.now = GateState(), 0.0
        self.load_s, self.restore_s = load_s, restore_s
        self.moves, self.done, self.failed, self.said = [], {}, {}, []
        self._events, self._n = [], 0
        #: When each worker's one lane, and its one loader, will be free.
        self._lane, self._loader = {}, {}
        self._seen = set()
        for number, n_bytes in enumerate(device_bytes):
            self.state.apply(WorkerJoined(f"w{number}", 1, n_bytes), 0.0)

    def park(self, at_s, key, *contexts, priority=(0,), seconds=0.1):
        for context in contexts:
            self._at(at_s, ContextDeclared(context, f"the {context}", 10))
        self._at(at_s, WorkParked(Work(key, group(*contexts), (*priority, at_s, self._n), 1.0)))
        self.done[key] = None
        self._seconds = seconds

    def _at(self, at_s, event):
        self._n += 1
        heapq.heappush(self._events, (at_s, self._n, event))

    def run(self, until_s=10_000.0):
        while self._events and self._events[0][0] <= until_s:
            self.now, _, event = heapq.heappop(self._events)
            self.state.apply(event, self.now)
            if isinstance(event, WorkEnded):
                self.done[event.key] = self.now
            self.decide()
            if not self._events and (self.state.ahead.waiting.works or self.state.placed):
                self._at(self.now + 0.25, ContextDeclared("tick", "tick"))  # the gate's ticker
                assert self.now < until_s, self.state.ahead.waiting.works
        return self

    def decide(self):
        for action in decide(self.state, self.now):
            self.said.append((self.now, action))
            if isinstance(action, Load):
                self._warm(action)
            elif isinstance(action, Assign):
                self._assign(action)
            elif isinstance(action, Fail):
                self.failed[action.key] = action.error
            elif isinstance(action, Offload):
                view = self.state.workers[action.worker]
                assert action.context not in view.in_use()
        for view in self.state.workers.values():
            assert view.free_bytes >= 0
        if self._n % 50 == 0:
            self.state.validate()

    def _warm(self, warm):
        key = (warm.worker, warm.context)
        is_built = key not in self._seen
        self._seen.add(key)
        self.moves.append((self.now, warm.worker, warm.context))
        seconds = self.load_s if is_built else self.restore_s
        end_s = max(self.now, self._loader.get(warm.worker, 0.0)) + seconds
        self._loader[warm.worker] = end_s
        report = ResidencyReported(
            warm.worker,
            warm.context,
            Tier.DEVICE,
            seconds=seconds,
            error=None,
            is_built=is_built,
            n_bytes=10,
        )
        self._at(end_s, report)

    def _assign(self, assign):
        end_s = max(self.now, self._lane.get(assign.worker, 0.0)) + self._seconds
        self._lane[assign.worker] = end_s
        self._at(end_s, WorkEnded(assign.key, True))


def test_two_contexts_with_work_take_turns():
    """200 s of work for two contexts, one device that holds one: little of it is spent moving."""
    played = Played(10)
    for i in range(2000):
        played.park(0.0, f"k{i}", "ab"[i % 2])
    played.run()
    assert all(played.done.values())
    assert 4 <= len(played.moves) <= 60
    assert played.now < 200 * 1.2 + 4
    # Neither waits for the other's end.
    firsts = sorted(played.done.values())
    assert min(played.done["k1"], played.done["k0"]) < 5
    assert max(played.done["k1"], played.done["k0"]) < 21
    assert firsts[-1] - max(t for k, t in played.done.items() if int(k[1:]) % 2) < 20


def test_alternating_chains_are_served_in_batches():
    """A task of b for each of a's, ready when that is done, as in a pipeline of two models."""
    played = Played(10)
    for i in range(300):
        played.park(i * 0.2, f"a{i:03}", "a")
        played.park(i * 0.2 + 0.1, f"b{i:03}", "b")
    played.run()
    assert all(played.done.values())
    assert len(played.moves) < 40


def test_a_context_without_waiting_work_is_evicted_at_once():
    played = Played(20)
    for i, context in enumerate("abc"):
        played.park(i * 10.0, context, context)
    played.run()
    assert [context for *_, context in played.moves] == ["a", "b", "c"]
    assert [action for _, action in played.said if isinstance(action, Offload)] == [
        Offload("w0", "a")
    ]
    assert not [action for _, action in played.said if isinstance(action, Vacate)]
    assert played.done["c"] < 22.5


def test_the_context_that_is_costlier_to_restore_stays():
    played = Played(20)
    played.park(0, "a", "a")
    played.park(10, "b", "b")
    played.run()
    played.state.estimates.cost.observe_warm("a", "", 50.0, is_built=False)
    played.state.estimates.cost.observe_warm("b", "", 0.5, is_built=False)
    played.park(20, "c", "c")
    played.run()
    assert [a.context for _, a in played.said if isinstance(a, Offload)] == ["b"]


def test_user_priority_precedes_turns():
    played = Played(10)
    for i in range(600):
        played.park(0.0, f"a{i:03}", "a", priority=(0,))
    played.park(10.0, "urgent", "b", priority=(-10,))
    played.park(10.0, "later", "c", priority=(10,))
    played.run()
    assert played.done["urgent"] < 10 + 0.2 + 2 + 0.2
    assert played.done["later"] == max(played.done.values())


def test_of_two_workers_each_serves_one():
    """One context fits on each worker: after the first loads, nothing moves."""
    played = Played(10, 10)
    for i in range(1000):
        played.park(0.0, f"k{i}", "ab"[i % 2])
    played.run()
    assert len(played.moves) <= 4
    assert played.now < 60


def test_workers_change_over_until_all_work_ends_together():
    """Four workers serve a; then as much work for b arrives: it gets two of them, one by one."""
    played = Played(*[10] * 4)
    for i in range(4000):
        played.park(0.0, f"a{i:04}", "a")
    for i in range(2000):
        played.park(50.0, f"b{i:04}", "b")
    played.run()
    assert played.now < 600 / 4 * 1.15 + 10
    assert len(played.moves) <= 12


def test_work_that_needs_two_gets_both_or_waits():
    played = Played(20)
    for i in range(50):
        played.park(0.0, f"both{i}", "a", "b")
        played.park(0.0, f"c{i}", "c")
    played.run()
    assert all(played.done.values())
    assert not played.failed


def test_two_pairs_that_overlap_on_two_workers_both_end():
    played = Played(20, 20)
    for i in range(100):
        played.park(0.0, f"ab{i}", "a", "b")
        played.park(0.0, f"bc{i}", "b", "c")
        played.park(0.0, f"ca{i}", "c", "a")
    played.run()
    assert all(played.done.values())


def test_contexts_larger_than_any_device_fail_with_the_numbers():
    played = Played(15, 12)
    played.park(0.0, "both", "a", "b")
    played.park(0.0, "one", "a")
    played.run()
    assert played.done["one"] and not played.done["both"]
    assert played.failed == {
        "both": "'the a' and 'the b' need 20 bytes on a device, and the largest device has 15 for"
        " contexts (2 workers checked; pcm.ladder.device.budget). Use a smaller model or data type,"
        " or workers with larger devices."
    }


def test_nothing_fails_while_a_device_limit_is_unknown():
    played = Played(15, None)
    played.park(0.0, "both", "a", "b")
    played.run()
    assert played.done["both"]
    assert {worker for _, worker, _ in played.moves} == {"w1"}


def test_promised_space_is_not_given_to_another_group():
    """Another group arrives while the assigned work ends."""
    played = Played(10)
    played.park(0.0, "long", "a", seconds=30.0)
    played.run(until_s=5.0)
    played.park(6.0, "b", "b", seconds=30.0)
    played.park(7.0, "c", "c", seconds=30.0)
    played.run()
    assert [context for *_, context in played.moves] == ["a", "b", "c"]


def test_urgent_work_during_an_eviction_does_not_deadlock():
    """a is about to be evicted for b when urgent work for a arrives."""
    played = Played(10, load_s=0.5)
    for i in range(6):
        played.park(0.0, f"a{i}", "a", seconds=4.0)
    played.park(1.0, "b0", "b", seconds=4.0)
    played.run(until_s=6.0)
    played.park(6.0, "urgent", "a", priority=(-10,), seconds=4.0)
    played.run()
    assert all(played.done.values())


@pytest.mark.parametrize("seed", range(40))
def test_all_work_is_done_under_random_priorities(seed):
    rng = random.Random(seed)
    played = Played(
        *(rng.choice([10, 20]) for _ in range(rng.randint(1, 3))),
        load_s=rng.choice([0.2, 2.0, 10.0]),
        restore_s=rng.choice([0.1, 1.0]),
    )
    for i in range(60):
        context = rng.choice("abc")
        priority = (rng.choice([-10, 0, 0, 10]),)
        played.park(rng.uniform(0, 40), f"k{i}", context, priority=priority, seconds=0.5)
    played.run()
    assert all(played.done.values())


@pytest.mark.parametrize("seed", range(5))
def test_few_moves_under_a_random_stream(seed):
    """Three contexts of which two fit, against Belady's choice on the same order of tasks."""
    rng = random.Random(seed)
    order = [rng.choice("abc") for _ in range(1000)]
    played = Played(20, load_s=0.3, restore_s=0.2)
    for i, context in enumerate(order):
        played.park(i * 0.12, f"k{i}", context)
    played.run()
    assert all(played.done.values())
    assert len(played.moves) <= 1.5 * belady(order, 2)


def belady(order, n_places):
    """Loads and restores under Belady's optimal replacement, tasks in their order."""
    there, n_moves = set(), 0
    for i, context in enumerate(order):
        if context in there:
            continue
        n_moves += 1
        if len(there) == n_places:
            rest = order[i:]
            there.discard(max(there, key=lambda c: rest.index(c) if c in rest else len(order)))
        there.add(context)
    return n_moves


def test_belady_is_computed_right():
    assert belady("abcabc", 2) == 4
    assert belady("aaaa", 1) == 1
    assert belady("abab", 1) == 4
