"""The gate's picture of the world: workers, residencies, waiting and running work."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from dask_pcm.scheduling.events import (
    Action,
    Assign,
    ContextDeclared,
    Event,
    Fail,
    Group,
    Load,
    LoadsGivenUp,
    Offload,
    Quarantine,
    ResidencyReported,
    Restarted,
    RunClosed,
    RunReported,
    Vacate,
    Work,
    WorkEnded,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
    WorkerPaused,
    WorkParked,
    WorkWithdrawn,
)
from dask_pcm.scheduling.learned.cost import CostModel
from dask_pcm.scheduling.learned.failures import Failures
from dask_pcm.scheduling.learned.fairness import Shares
from dask_pcm.scheduling.learned.lifetimes import Pool, expected_s
from dask_pcm.scheduling.state.queue import Waiting
from dask_pcm.scheduling.state.worker import WorkerView, still_s
from dask_pcm.scheduling.units import DeviceDemand
from dask_pcm.tiers import ON_DEVICE, Tier

#: Decisions that are remembered, for whoever asks why.
N_DECISIONS = 2_000


@dataclass(slots=True)
class Expected:
    """What a run will still submit."""

    group: Group
    n_rows: float
    n_units: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided, when, and the numbers that it was decided by (``explain.py``)."""

    at: float
    action: Action
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """When the work of a group will be done, as it looked at some time.

    Attributes
    ----------
    plan
        The number of the plan that it was made after; the next one makes it stale.
    fastest_row_s
        Of the fastest worker that is at it then.
    """

    plan: int
    drained_at: float
    fastest_row_s: float


@dataclass(slots=True)
class GateState:
    """Apply events and actions; ask; validate. No I/O, no clock."""

    cost: CostModel = field(default_factory=CostModel)
    workers: dict[str, WorkerView] = field(default_factory=dict)
    waiting: Waiting = field(default_factory=Waiting)
    shares: Shares = field(default_factory=Shares)
    pools: dict[str, Pool] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)
    placed: dict[object, str] = field(default_factory=dict)
    runs: dict[str, Expected] = field(default_factory=dict)
    #: What contexts take on a device and in files, as far as it is known; and their names.
    sizes: dict[str, int] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    #: Hosts to which the files of each context have come.
    staged_on: dict[str, set[str]] = field(default_factory=dict)
    #: What is to be done now, as it is decided.
    actions: list[Action] = field(default_factory=list)
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=N_DECISIONS))
    #: Workers of which something has been heard since the last decision; those that had room after
    #: it; and whether work has come to a group that had none.
    changed: dict[str, None] = field(default_factory=dict)
    roomy: dict[str, None] = field(default_factory=dict)
    has_new_work: bool = False
    #: When something was last decided for each group, or for a context that groups need.
    moved_at: dict[Group | str, float] = field(default_factory=dict)
    #: When all was last looked at, and how much there was to be looked at.
    planned_at: float = -math.inf
    n_plans: int = 0
    n_looks: int = 0
    forecasts: dict[Group, Forecast] = field(default_factory=dict)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def apply(self, happening: Event | Action, now: float) -> None:
        """Take in an event, or an action that was carried out, at `now` seconds."""
        match happening:
            case WorkEnded(key, is_finished):
                self._use(key, now)
                self._end(key, is_finished)
            case WorkParked(work):
                self._park(work, now)
            case Assign(key, worker):
                self._place(key, worker, now)
                self._use(key, now)
            case WorkWithdrawn(key) | Fail(key):
                self._end(key, is_finished=False)
                self._unpark(key)
            case ResidencyReported():
                self._report(happening, now)
            case WorkerJoined():
                self._join(happening, now)
            case WorkerLeft(worker, is_lost):
                self._lose(worker, is_lost, now)
            case WorkerPaused(worker, is_paused):
                if worker in self.workers:
                    self.workers[worker].is_paused = is_paused
                    self.changed[worker] = None
            case WorkerDraining(worker, seconds):
                if worker in self.workers:
                    view = self.workers[worker]
                    view.is_draining, view.ends_at = True, min(view.ends_at, now + seconds)
            case RunReported(run, group, n_rows, n_units):
                if run not in self.runs:
                    self._forgive(group)
                self.runs[run] = Expected(group, n_rows, n_units)
            case RunClosed(run):
                self.runs.pop(run, None)
            case ContextDeclared(context, name, n_bytes, file_bytes):
                self.names[context] = name
                self.file_bytes[context] = file_bytes
                if n_bytes is not None and context not in self.measured:
                    self._resize(context, n_bytes)
            case Restarted():
                self.failures.clear()
                for view in self.workers.values():
                    view.begun.clear()
            case Load(worker, context):
                view = self.workers[worker]
                view.loading_s[context] = self.warm_s(view, context)
                view.loading_since[context] = self.moved_at[context] = now
                self._stand(view, context, Tier.LOADING)
            case Offload(worker, context):
                self._stand(self.workers[worker], context, Tier.HOST)
                self.workers[worker].leaving.pop(context, None)
            case Vacate(worker, context, group):
                self.workers[worker].leaving[context] = group
                self.moved_at[group] = now
            case Quarantine(host, seconds, error):
                self.failures.shun(host, now + seconds, error)
            case LoadsGivenUp(context):
                self.failures.given_up.add(context)

    def decide(self, action: Action, now: float, *numbers: float) -> None:
        """Have something done, and remember what it was decided by."""
        self.apply(action, now)
        self.actions.append(action)
        self.decisions.append(Decision(now, action, numbers))

    # -- what there is to do --------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Groups with work waiting or expected; the most urgent waiting work first."""
        urgent = sorted(
            (self.urgency(group), next(self._order), group) for group in self.waiting.queues
        )
        expected = (run.group for run in self.runs.values() if run.n_rows > 0)
        return list(dict.fromkeys([group for *_, group in urgent] + list(expected)))

    def urgency(self, group: Group) -> tuple[object, ...]:
        """What comes first: what users have put first; who has been served least; who was first."""
        work = self.waiting.peek(group)
        assert work is not None
        return work.priority[:1], self.shares.of(group.client), work.priority

    def peek(self, group: Group, device: str = "") -> Work | None:
        """The next work of `group`, for a device, left where it is."""
        return self.waiting.peek(group, device)

    def rows_ahead(self, group: Group) -> float:
        """Rows of `group` that wait or that a run will submit."""
        expected = sum(run.n_rows for run in self.runs.values() if run.group == group)
        return self.waiting.rows(group) + expected

    def works_ahead(self, group: Group) -> int:
        """Pieces of work of `group` that wait or that a run could submit now."""
        queue = self.waiting.queues.get(group)
        expected = sum(run.n_units for run in self.runs.values() if run.group == group)
        return (queue.n_works if queue else 0) + expected

    def keys(self, group: Group) -> list[object]:
        """Keys of the work of `group` that waits, the next one first."""
        return self.waiting.keys(group)

    # -- who could do it ------------------------------------------------------------------------

    def candidates(self, group: Group) -> list[WorkerView]:
        """Workers that may take work of `group`, warm or not."""
        addresses = self.workers if group.allowed is None else group.allowed & self.workers.keys()
        views = (self.workers[address] for address in addresses)
        shunned = self.failures.shunned
        return [v for v in views if not v.is_paused and (not shunned or v.host not in shunned)]

    def askers(self, group: Group) -> list[DeviceDemand]:
        """Workers that may take work of `group`, by device model, and how fast they are."""
        counts = Counter(view.device for view in self.candidates(group) if not view.is_draining)
        return [
            DeviceDemand(device, n_workers, self.cost.row_s(group.costs, "", device))
            for device, n_workers in counts.items()
        ]

    def may_serve(self, view: WorkerView, group: Group) -> bool:
        """Whether a worker may be sent work of `group` now, if it has room."""
        return (
            not view.is_paused
            and (group.allowed is None or view.address in group.allowed)
            and view.serves(group.contexts)
            and view.host not in self.failures.shunned
        )

    def given_s(self, view: WorkerView) -> float | None:
        """Learned seconds of all that `view` was given and has not ended; None if not known."""
        total = 0.0
        for group, n_rows in view.n_rows.items():
            row_s = self.cost.row_s(group.costs, view.address, view.device)
            if row_s is None:
                return None
            total += n_rows * row_s
        return total

    def backlog_s(self, view: WorkerView, now: float) -> float:
        """Estimated seconds until `view` has done what it was given."""
        if not view.running:
            return 0.0
        seconds = sum(
            n_rows * (self.row_s(group, view, now) or 0.0) for group, n_rows in view.n_rows.items()
        )
        return still_s(max(0.0, seconds - view.ahead_s), now - view.busy_since)

    def row_s(self, group: Group, view: WorkerView, now: float) -> float | None:
        """Learned seconds a row; before that, at least what the first rows have taken so far."""
        learned = self.cost.row_s(group.costs, view.address, view.device)
        if learned is not None:
            return learned
        running = view.n_rows.get(group)
        return (now - view.busy_since) / running if running else None

    def expected_s(self, view: WorkerView, seconds: float, now: float) -> float:
        """Seconds that `view` is expected to take for what takes `seconds` without a loss."""
        pool = self.pools.get(view.pool)
        return seconds if pool is None else expected_s(seconds, pool.hazard(now))

    def lasting_s(self, view: WorkerView, seconds: float, begins_at: float) -> float:
        """The same; infinity where it will be gone by then."""
        if begins_at + seconds > view.ends_at:
            return math.inf
        return self.expected_s(view, seconds, begins_at)

    def free_bytes(self, view: WorkerView) -> float:
        """What is left of a worker's device, as far as sizes are known."""
        if view.device_bytes is None:
            return math.inf
        return view.device_bytes - view.taken_bytes

    def warm_s(self, view: WorkerView, context: str) -> float:
        """Estimated seconds to bring a context to a worker's device."""
        n_bytes = self.sizes.get(context, 0)
        if view.tiers.get(context) is Tier.HOST:
            return self.cost.restore_s(context, view.device, n_bytes)
        load_s = self.cost.load_s(context, view.device, n_bytes)
        if view.host in self.staged_on.get(context, ()):
            return load_s
        return load_s + self.cost.stage_s(context, self.file_bytes.get(context, 0))

    # -- books ----------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Turn what finished since the last call into costs.

        A worker is one server: while it has work, the time between two finishes is what the
        second took, whichever lane it ran in. Finishes that arrive together share the time. Lanes
        take turns, so what that time is more than the second costs was spent on what still runs.
        """
        for address in self.changed:
            view = self.workers.get(address)
            if view is None or not view.finished:
                continue
            seconds, n_rows = now - view.busy_since, sum(view.finished.values())
            view.ahead_s = view.ahead_s + seconds if n_rows else 0.0
            for group, done in view.finished.items():
                if not done:
                    continue
                costs = group.costs, address, view.device
                self.cost.observe_rows(*costs, seconds * done / n_rows, done)
                view.ahead_s -= done * (self.cost.row_s(*costs) or 0.0)
            view.ahead_s = min(max(0.0, view.ahead_s), self.given_s(view) or 0.0)
            view.finished.clear()
            view.busy_since = now

    def validate(self) -> None:
        """Raise AssertionError where the picture contradicts itself."""
        self.waiting.validate()
        assert not self.waiting.works.keys() & self.placed.keys()
        running = {key: view.address for view in self.workers.values() for key in view.running}
        assert running == self.placed, (running, self.placed)
        n_alive = {name: pool.n_workers for name, pool in self.pools.items() if pool.n_workers}
        pools = [view.pool for view in self.workers.values()]
        assert n_alive == {name: pools.count(name) for name in set(pools)}
        for client in {work.group.client for work in self.waiting.works.values()}:
            n_works = sum(work.group.client == client for work in self.waiting.works.values())
            assert self.shares.n_waiting[client] == n_works, client
        for view in self.workers.values():
            groups = [work.group for work in view.running.values()]
            assert view.n_works == {group: groups.count(group) for group in set(groups)}
            assert view.n_rows.keys() == view.n_works.keys()
            there = [c for c, tier in view.tiers.items() if tier in ON_DEVICE]
            assert view.taken_bytes == sum(self.sizes.get(c, 0) for c in there), view.address
            assert Tier.ABSENT not in view.tiers.values(), view.address
            for context in view.leaving:
                assert view.tiers.get(context) is Tier.DEVICE, (view.address, context)
            if view.is_taken:
                assert len(view.running) == 1, view.running

    def _forgive(self, group: Group) -> None:
        """Somebody asks anew for contexts that were given up: they are tried again."""
        for context in self.failures.forgive(group.contexts):
            for view in self.workers.values():
                if view.tiers.get(context) is Tier.FAILED:
                    del view.tiers[context]

    def _park(self, work: Work, now: float) -> None:
        if self.failures.given_up:
            expected = {context for run in self.runs.values() for context in run.group.contexts}
            if not expected.intersection(work.group.contexts):
                self._forgive(work.group)
        is_known = self._end(work.key, is_finished=False) or self._unpark(work.key) is not None
        if not is_known:
            self._came(work)
        if self.waiting.add(work):
            self.has_new_work = True
            self.moved_at[work.group] = now
        self.shares.arrive(work.group.client)

    def _came(self, work: Work) -> None:
        """What a run has submitted is not to come any more, until it says how much is."""
        for run in self.runs.values():
            if run.group == work.group:
                run.n_rows = max(0.0, run.n_rows - work.n_rows)
                return

    def _unpark(self, key: object) -> Work | None:
        work = self.waiting.remove(key)
        if work is not None:
            self.shares.leave(work.group.client)
        return work

    def _place(self, key: object, worker: str, now: float) -> None:
        view, work = self.workers[worker], self._unpark(key)
        assert work is not None
        if view.reserved_for == work.group:
            view.reserved_for = None
        view.give(work, now)
        self.moved_at[work.group] = now
        self.placed[key] = worker
        row_s = self.cost.row_s(work.group.costs, worker, view.device)
        self.shares.charge(work.group.client, work.n_rows * row_s if row_s else 0.0)

    def _end(self, key: object, is_finished: bool) -> bool:
        """It is not on its worker any more; answered with whether it was on any."""
        worker = self.placed.pop(key, None)
        if worker is None:
            return False
        view = self.workers[worker]
        work = view.take(key)
        self.changed[worker] = None
        if is_finished:
            n_rows = 0.0 if work.is_again else work.n_rows
            view.finished[work.group] = view.finished.get(work.group, 0.0) + n_rows
        return True

    def _use(self, key: object, now: float) -> None:
        view = self.workers.get(self.placed.get(key, ""))
        if view is not None:
            for context in view.running[key].group.contexts:
                view.used_at[context] = now

    def _join(self, event: WorkerJoined, now: float) -> None:
        self._lose(event.worker, True, now)
        pool = event.pool or event.device
        view = self.workers[event.worker] = WorkerView(
            event.worker,
            event.n_lanes,
            event.device_bytes,
            event.host,
            event.device,
            pool,
            joined_at=now,
            ends_at=now + event.ends_in_s,
        )
        self.pools.setdefault(pool, Pool()).join(now)
        self.changed[event.worker] = None
        for context in self.failures.blame(view.host, self.names, now):
            self._stand(view, context, Tier.FAILED)

    def _lose(self, worker: str, is_lost: bool, now: float) -> None:
        view = self.workers.pop(worker, None)
        if view is None:
            return
        self.pools[view.pool].leave(view.joined_at, now, is_lost or view.is_draining)
        for context in view.begun:
            self.failures.ended(view.host, context, now)
        self.cost.forget_worker(worker)
        self.failures.leave(worker)
        self.changed.pop(worker, None)
        self.roomy.pop(worker, None)
        for key in view.running:
            del self.placed[key]

    def _report(self, report: ResidencyReported, now: float) -> None:
        view = self.workers.get(report.worker)
        if view is None:
            return
        self.changed[view.address] = None
        is_asked = report.context in view.loading_since
        if report.tier is Tier.FAILED and not is_asked:
            # A task has loaded it where the gate does not see: whoever asks here has it tried.
            self._stand(view, report.context, Tier.ABSENT)
            return
        self._stand(view, report.context, report.tier)
        if report.tier is not Tier.DEVICE:
            view.leaving.pop(report.context, None)
        if report.n_bytes:
            self._resize(report.context, report.n_bytes)
            self.measured.add(report.context)
        if report.device_bytes is not None:
            view.device_bytes = report.device_bytes
        if report.tier is Tier.LOADING:
            view.begun.add(report.context)
        else:
            view.begun.discard(report.context)
            view.loading_since.pop(report.context, None)
        if report.tier is Tier.DEVICE:
            self._warmed(view, report, now)
        if report.tier is Tier.FAILED:
            error = report.error or "no reason was given"
            has_loaded = self.cost.has_loaded(report.context)
            self.failures.add(view.host, report.context, report.kind, error, has_loaded)
            self.failures.rest(view.address, report.context, report.kind, now)

    def _warmed(self, view: WorkerView, report: ResidencyReported, now: float) -> None:
        context = report.context
        view.used_at[context] = view.warm_since[context] = now
        self.failures.loaded(view.address, view.host, context)
        staged_on = self.staged_on.setdefault(context, set())
        if report.staged_s and view.host not in staged_on:
            self.cost.observe_staged(context, report.staged_s, self.file_bytes.get(context, 0))
        if report.seconds:
            seconds, n_bytes = report.seconds - report.staged_s, self.sizes.get(context, 0)
            self.cost.observe_warm(context, view.device, seconds, report.is_built, n_bytes)
        if report.is_built:
            staged_on.add(view.host)

    def _stand(self, view: WorkerView, context: str, tier: Tier) -> None:
        n_bytes = self.sizes.get(context, 0)
        before = view.tiers.pop(context, Tier.ABSENT)
        if tier is not Tier.ABSENT:
            view.tiers[context] = tier
        view.taken_bytes += n_bytes * ((tier in ON_DEVICE) - (before in ON_DEVICE))

    def _resize(self, context: str, n_bytes: int) -> None:
        grown = n_bytes - self.sizes.get(context, 0)
        self.sizes[context] = n_bytes
        for view in self.workers.values():
            if view.tiers.get(context) in ON_DEVICE:
                view.taken_bytes += grown
