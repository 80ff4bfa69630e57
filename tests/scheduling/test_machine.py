"""A Hypothesis state machine over the gate's state and policy: events in any order."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dask_pcm.scheduling.actions import (
    Assign,
    Fail,
    Load,
    Offload,
    Quarantine,
)
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
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
    WorkerPaused,
    WorkHandedOver,
    WorkParked,
    WorkRejoined,
    WorkWithdrawn,
)
from dask_pcm.scheduling.explain import describe, explain
from dask_pcm.scheduling.learned.failures import DEVICE
from dask_pcm.scheduling.policy import decide
from dask_pcm.scheduling.rules.rules import Rules
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.tiers import Tier

WORKERS, CONTEXTS, DEVICES = ["w0", "w1", "w2"], ["a", "b"], ["T4", "H100"]
GROUPS = [
    Group(("a",), "k"),
    Group(("b",), "k", client="ann"),
    Group(("a",), "k", client="bob"),
    Group(("a", "b"), "k"),
    Group(("a",), "k", frozenset({"w1"})),
    Group(("b",), "k", is_isolated=True),
]
workers, contexts = st.sampled_from(WORKERS), st.sampled_from(CONTEXTS)


class Gate(RuleBasedStateMachine):
    """No work is lost, committed twice or run on a cold worker; every decision has a reason."""

    def __init__(self):
        super().__init__()
        self.state = GateState()
        self.now = 0.0
        #: Work without a result, by key; and the keys of committed work.
        self.wanted: dict[object, Work] = {}
        self.committed: list[object] = []
        #: Reports in flight to the gate.
        self.delayed: list[object] = []
        self.n = 0

    def tell(self, *events):
        for event in events:
            self.state.apply(event, self.now)

    # -- work -----------------------------------------------------------------------------------

    @rule(
        group=st.sampled_from(GROUPS),
        n_rows=st.floats(0.5, 1000),
        n=st.integers(1, 5),
        cut_for=st.sampled_from(["", *DEVICES]),
    )
    def submit(self, group, n_rows, n, cut_for):
        for _ in range(n):
            self.n += 1
            work = Work(f"k{self.n}", group, (self.n % 3, self.n), n_rows, cut_for)
            self.wanted[work.key] = work
            self.tell(WorkParked(work))

    @precondition(lambda self: self.state.placed)
    @rule(data=st.data(), is_finished=st.booleans())
    def end(self, data, is_finished):
        key = data.draw(st.sampled_from(sorted(self.state.placed)))
        self.tell(WorkEnded(key, is_finished), WorkEnded(key, is_finished))  # a duplicated message
        if is_finished:
            self.committed.append(key)
            del self.wanted[key]
        else:
            self.tell(WorkParked(self.wanted[key]))

    @precondition(lambda self: self.state.placed)
    @rule(data=st.data(), n_rows=st.sampled_from([None, 1.0, 50.0]), n=st.integers(1, 2))
    def hand_over(self, data, n_rows, n):
        """Work leaves its lane: it has seceded, or is served; the message may be duplicated."""
        key = data.draw(st.sampled_from(sorted(self.state.placed)))
        self.tell(*[WorkHandedOver(key, n_rows)] * n)

    @precondition(lambda self: self.state.placed)
    @rule(data=st.data(), n=st.integers(1, 2))
    def rejoin(self, data, n):
        """Work is on a lane again; it need not have left one."""
        key = data.draw(st.sampled_from(sorted(self.state.placed)))
        self.tell(*[WorkRejoined(key)] * n)

    @rule(number=st.integers(1, 50), n_rows=st.sampled_from([None, 1.0]))
    def hand_over_late(self, number, n_rows):
        """It says so of work that has ended, or waits."""
        if f"k{number}" not in self.state.placed:
            self.tell(WorkHandedOver(f"k{number}", n_rows))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def withdraw(self, data):
        key = data.draw(st.sampled_from(sorted(self.wanted)))
        del self.wanted[key]
        self.tell(WorkWithdrawn(key), WorkWithdrawn(key))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def suspect(self, data):
        """Work becomes isolated, and is parked again."""
        key = data.draw(st.sampled_from(sorted(self.wanted)))
        work = self.wanted[key]
        group = Group(work.group.contexts, "k", work.group.allowed, work.group.client, True)
        self.wanted[key] = Work(key, group, work.priority, work.n_rows)
        self.tell(WorkParked(self.wanted[key]))

    @rule(group=st.sampled_from(GROUPS), n_rows=st.integers(0, 1000), is_open=st.booleans())
    def run_says(self, group, n_rows, is_open):
        self.tell(RunReported("run", group, float(n_rows), 3) if is_open else RunClosed("run"))

    # -- workers --------------------------------------------------------------------------------

    @rule(
        worker=workers,
        device_bytes=st.sampled_from([None, 10, 15, 30]),
        host=st.sampled_from(["", "node"]),
        device=st.sampled_from(DEVICES),
        ends_in_s=st.sampled_from([float("inf"), 3.0, 50.0]),
    )
    def join(self, worker, device_bytes, host, device, ends_in_s):
        self._lose(worker, is_lost=True)
        self.tell(WorkerJoined(worker, 2, device_bytes, host, device, device, ends_in_s))

    @rule(worker=workers, is_lost=st.booleans())
    def lose(self, worker, is_lost):
        self._lose(worker, is_lost)

    def _lose(self, worker, is_lost):
        view = self.state.workers.get(worker)
        works = [*view.running.values(), *view.waiting.values()] if view else []
        self.tell(WorkerLeft(worker, is_lost), WorkerLeft(worker, is_lost))
        self.tell(*map(WorkParked, works))  # Dask parks again what ran there

    @rule(worker=workers, seconds=st.floats(0.0, 20.0))
    def notice(self, worker, seconds):
        """A worker gets notice and hands back its unstarted work: here, all but one."""
        self.tell(WorkerDraining(worker, seconds), WorkerDraining(worker, seconds))
        view = self.state.workers.get(worker)
        for work in list(view.running.values())[1:] if view else []:
            self.tell(WorkEnded(work.key, False), WorkParked(work))

    @rule(worker=workers, is_paused=st.booleans())
    def pause(self, worker, is_paused):
        self.tell(WorkerPaused(worker, is_paused))

    @rule(
        worker=workers,
        context=contexts,
        tier=st.sampled_from(list(Tier)),
        n_bytes=st.sampled_from([0, 6, 10]),
        kind=st.sampled_from(["OSError", DEVICE]),
        n=st.integers(1, 2),
        is_late=st.booleans(),
        n_rows=st.sampled_from([0, 5, 500]),
    )
    def report(self, worker, context, tier, n_bytes, kind, n, is_late, n_rows):
        """Reports may be duplicated, late or unrequested."""
        said = ResidencyReported(
            worker,
            context,
            tier,
            seconds=1.5,
            error="failed",
            is_built=True,
            n_bytes=n_bytes,
            device_bytes=None,
            kind=kind,
            staged_s=0.5,
            n_rows=n_rows,
        )
        if is_late:
            self.delayed += [said] * n
        else:
            self.tell(*[said] * n)

    @precondition(lambda self: self.delayed)
    @rule(data=st.data())
    def arrive(self, data):
        """A delayed report arrives out of order."""
        number = data.draw(st.integers(0, len(self.delayed) - 1))
        self.tell(self.delayed.pop(number))

    @rule(context=contexts, n_bytes=st.sampled_from([None, 6, 10]))
    def declare(self, context, n_bytes):
        self.tell(ContextDeclared(context, context, n_bytes, 1000))

    @rule(context=contexts)
    def release(self, context):
        """All workers drop a context, except those that use it."""
        for name, view in list(self.state.workers.items()):
            if context not in view.in_use():
                self.tell(ResidencyReported(name, context, Tier.ABSENT))

    @rule(worker=workers, host=st.sampled_from(["", "node"]), context=contexts)
    def process_ended(self, worker, host, context):
        self.tell(ProcessEnded(worker, host, (context,)))

    @rule()
    def restart(self):
        self.tell(Restarted())

    # -- decisions ------------------------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([0.0, 0.01, 1.0, 15.0]),
        idle_s=st.sampled_from([None, 0.5, 20.0]),
        is_large=st.booleans(),
    )
    def think(self, seconds, idle_s, is_large):
        self.now += seconds
        if is_large:  # as in a large cluster, which is not planned at every call
            self.state.plans.n_looks += 10_000
        # Unrequested reports may exceed the device limit.
        over = {n: view.free_bytes < 0 for n, view in self.state.workers.items()}
        n_decided = len(self.state.plans.decisions)
        actions = decide(self.state, self.now, Rules(idle_s=idle_s))
        for action in actions:
            self.check(action, over)
        made = list(self.state.plans.decisions)[n_decided:]
        assert [decision.action for decision in made] == actions
        for decision in made:
            assert describe(self.state, decision)

    def check(self, action, over):
        views = self.state.workers
        match action:
            case Offload(worker, context):
                assert context not in views[worker].in_use()
            case Load(worker, _):
                # The policy made room, as far as sizes are known.
                assert views[worker].free_bytes >= 0 or over[worker]
                assert not views[worker].is_draining
            case Assign(key, worker):
                view, work = views[worker], self.wanted[key]
                assert view.running[key] == work
                for context in work.group.contexts:
                    rows = [
                        view.served.get(one, other.n_rows)
                        for one, other in view.running.items()
                        if context in other.group.contexts
                    ]
                    before = sum(rows) - work.n_rows
                    assert before < view.serves_rows.get(context, math.inf)
                assert view.holds(work.group.contexts)
                assert not view.is_paused
                assert work.group.allowed is None or worker in work.group.allowed
                assert view.host not in self.state.failures.quarantined
                assert len(view.running) == 1 or not any(
                    other.group.is_isolated for other in view.running.values()
                )
            case Fail(key):
                del self.wanted[key]
            case Quarantine(host):
                for view in views.values():
                    assert view.host != host or Tier.DEVICE not in view.tiers.values()

    @invariant()
    def no_work_is_lost_or_duplicated(self):
        self.state.validate()
        assert (
            self.state.ahead.waiting.works.keys() | self.state.placed.keys() == self.wanted.keys()
        )
        assert len(self.committed) == len(set(self.committed))

    @invariant()
    def all_work_can_be_explained(self):
        for key in self.wanted:
            text = explain(self.state, key, self.now)
            assert "waits" in text or "is assigned to" in text

    def teardown(self):
        """Once failures stop and one worker stays, all work is done."""
        self.join_working()
        for _ in range(400):
            if not self.wanted:
                return
            self.now += 5.0
            for action in decide(self.state, self.now):
                if isinstance(action, Fail):
                    del self.wanted[action.key]
            self.state.validate()
            for name, view in self.state.workers.items():
                for context, tier in list(view.tiers.items()):
                    if tier is Tier.LOADING:
                        self.tell(ResidencyReported(name, context, Tier.DEVICE, seconds=1.0))
            for key in list(self.state.placed):
                self.tell(WorkEnded(key, is_finished=True))
                del self.wanted[key]
        waiting = "\n".join(explain(self.state, key, self.now) for key in self.wanted)
        raise AssertionError(f"not done after {self.now} s:\n{waiting}")

    def join_working(self):
        self._lose("w1", is_lost=False)
        self.tell(WorkerJoined("w1", 2, None, "well", "T4", "well"))
        for name in self.state.workers:
            self.tell(WorkerPaused(name, False))


Gate.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestGate = Gate.TestCase
