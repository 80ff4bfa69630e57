"""The gate's state: workers, residencies, waiting and assigned work, and learned costs."""

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
from dask_pcm.scheduling.feed.feed import DeviceDemand
from dask_pcm.scheduling.learned.cost import CostModel
from dask_pcm.scheduling.learned.failures import Failures
from dask_pcm.scheduling.learned.fairness import Shares
from dask_pcm.scheduling.learned.lifetimes import Lifetimes, expected_s
from dask_pcm.scheduling.state.contexts import Contexts
from dask_pcm.scheduling.state.decisions import N_DECISIONS, Decision, Forecast
from dask_pcm.scheduling.state.queue import WorkQueue
from dask_pcm.scheduling.state.runs import Runs
from dask_pcm.scheduling.state.worker import WorkerView, remaining_s
from dask_pcm.tiers import ON_DEVICE, Tier


@dataclass(slots=True)
class GateState:
    """What the policy knows; events and actions change it, rules read it.

    Pure: no I/O and no clock of its own. Times are seconds of whatever clock the caller uses.
    """

    cost: CostModel = field(default_factory=CostModel)
    workers: dict[str, WorkerView] = field(default_factory=dict)
    waiting: WorkQueue = field(default_factory=WorkQueue)
    runs: Runs = field(default_factory=Runs)
    contexts: Contexts = field(default_factory=Contexts)
    shares: Shares = field(default_factory=Shares)
    pools: dict[str, Lifetimes] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)
    #: Worker of each piece of assigned work, by key.
    placed: dict[object, str] = field(default_factory=dict)
    #: Actions of the decision round in progress.
    actions: list[Action] = field(default_factory=list)
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=N_DECISIONS))
    #: Workers with an event since the last decision; workers that had room after it; and whether
    #: work has come to a group that had none. A round between plans looks at these only.
    changed: dict[str, None] = field(default_factory=dict)
    roomy: dict[str, None] = field(default_factory=dict)
    has_new_work: bool = False
    #: When something was last decided for each group, or for a context that groups need.
    moved_at: dict[Group | str, float] = field(default_factory=dict)
    #: Time and number of the last planning round, and the pairs of group and worker it looked at.
    planned_at: float = -math.inf
    n_plans: int = 0
    n_looks: int = 0
    forecasts: dict[Group, Forecast] = field(default_factory=dict)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def apply(self, happening: Event | Action, now: float) -> None:
        """Update the state by an event, or by an action that is being carried out."""
        match happening:
            case WorkEnded(key, is_finished):
                self._touch(key, now)
                self._end_work(key, is_finished)
            case WorkParked(work):
                self._park_work(work, now)
            case Assign(key, worker):
                self._assign_work(key, worker, now)
                self._touch(key, now)
            case WorkWithdrawn(key) | Fail(key):
                self._end_work(key, is_finished=False)
                self._unpark_work(key)
            case ResidencyReported():
                self._report_residency(happening, now)
            case WorkerJoined():
                self._add_worker(happening, now)
            case WorkerLeft(worker, is_lost):
                self._remove_worker(worker, is_lost, now)
            case WorkerPaused(worker, is_paused):
                if worker in self.workers:
                    self.workers[worker].is_paused = is_paused
                    self.changed[worker] = None
            case WorkerDraining(worker, seconds):
                if worker in self.workers:
                    view = self.workers[worker]
                    view.is_draining, view.ends_at = True, min(view.ends_at, now + seconds)
            case RunReported(run, group):
                if run not in self.runs:
                    self._forgive(group)
                self.runs.report(happening)
            case RunClosed(run):
                self.runs.close(run)
            case ContextDeclared(context):
                n_bytes = self.contexts.declare(happening)
                if n_bytes is not None:
                    self._resize(context, n_bytes)
            case Restarted():
                self.failures.clear()
                for view in self.workers.values():
                    view.begun.clear()
            case Load(worker, context):
                view = self.workers[worker]
                view.loading_s[context] = self.warm_s(view, context)
                view.loading_since[context] = self.moved_at[context] = now
                self._set_tier(view, context, Tier.LOADING)
            case Offload(worker, context):
                self._set_tier(self.workers[worker], context, Tier.HOST)
                self.workers[worker].evicting.pop(context, None)
            case Vacate(worker, context, group):
                self.workers[worker].evicting[context] = group
                self.moved_at[group] = now
            case Quarantine(host, seconds, error):
                self.failures.quarantine(host, now + seconds, error)
            case LoadsGivenUp(context):
                self.failures.given_up.add(context)

    def commit(self, action: Action, now: float, *numbers: float) -> None:
        """Decide on an action: apply it, return it to the caller, and record its numbers."""
        self.apply(action, now)
        self.actions.append(action)
        self.decisions.append(Decision(now, action, numbers))

    # -- work -----------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Groups with waiting or expected work, the most urgent waiting work first."""
        urgent = sorted(
            (self.urgency(group), next(self._order), group) for group in self.waiting.queues
        )
        return list(dict.fromkeys([group for *_, group in urgent]) | self.runs.expected_groups())

    def urgency(self, group: Group) -> tuple[object, ...]:
        """Sort key of a group's next work: user priority, then fairness, then full priority."""
        work = self.waiting.peek(group)
        assert work is not None
        return work.priority[:1], self.shares.get_served_s(group.client), work.priority

    def peek(self, group: Group, device: str = "") -> Work | None:
        """The next work of `group` for a device model; it stays in the queue."""
        return self.waiting.peek(group, device)

    def rows_ahead(self, group: Group) -> float:
        """Rows of `group` that wait or that runs will submit."""
        return self.waiting.rows(group) + self.runs.expected_rows(group)

    def works_ahead(self, group: Group) -> int:
        """Pieces of work of `group` that wait or that runs could submit now."""
        queue = self.waiting.queues.get(group)
        return (queue.n_works if queue else 0) + self.runs.expected_units(group)

    # -- workers --------------------------------------------------------------------------------

    def candidates(self, group: Group) -> list[WorkerView]:
        """Workers that may run work of `group`, warm or not."""
        addresses = self.workers if group.allowed is None else group.allowed & self.workers.keys()
        workers = (self.workers[address] for address in addresses)
        bad_hosts = self.failures.quarantined
        return [w for w in workers if not w.is_paused and w.host not in bad_hosts]

    def askers(self, group: Group) -> list[DeviceDemand]:
        """Workers that may run work of `group`, counted by device model, with their speeds."""
        counts = Counter(view.device for view in self.candidates(group) if not view.is_draining)
        return [
            DeviceDemand(device, n_workers, self.cost.row_s(group.costs, "", device))
            for device, n_workers in counts.items()
        ]

    def can_serve(self, view: WorkerView, group: Group) -> bool:
        """Whether work of `group` may be assigned to a worker, once it has a free lane."""
        return (
            not view.is_paused
            and (group.allowed is None or view.address in group.allowed)
            and view.serves(group.contexts)
            and view.host not in self.failures.quarantined
        )

    # -- estimates ------------------------------------------------------------------------------

    def backlog_s(self, view: WorkerView, now: float) -> float:
        """Estimated seconds until `view` has finished its assigned work."""
        if not view.running:
            return 0.0
        seconds = sum(
            n_rows * (self.row_s(group, view, now) or 0.0) for group, n_rows in view.n_rows.items()
        )
        return remaining_s(max(0.0, seconds - view.ahead_s), now - view.busy_since)

    def row_s(self, group: Group, view: WorkerView, now: float) -> float | None:
        """Seconds per row on a worker: learned, or a lower bound while the first rows run."""
        learned = self.cost.row_s(group.costs, view.address, view.device)
        if learned is not None:
            return learned
        running = view.n_rows.get(group)
        return (now - view.busy_since) / running if running else None

    def expected_s(self, view: WorkerView, seconds: float, now: float) -> float:
        """Expected seconds for work of `seconds` seconds on `view`, repeats after losses included.

        The hazard rate is that of the worker's pool; see ``lifetimes.expected_s``.
        """
        pool = self.pools.get(view.pool)
        return seconds if pool is None else expected_s(seconds, pool.hazard(now))

    def lasting_s(self, view: WorkerView, seconds: float, begins_at: float) -> float:
        """As ``expected_s``; infinity if the worker ends before the work does."""
        if begins_at + seconds > view.ends_at:
            return math.inf
        return self.expected_s(view, seconds, begins_at)

    def warm_s(self, view: WorkerView, context: str) -> float:
        """Estimated seconds to bring a context to a worker's device."""
        return self.contexts.warm_s(view, context, self.cost)

    # -- consistency ----------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Learn costs from the work that has finished since the last call."""
        for address in self.changed:
            if address in self.workers:
                self.workers[address].settle(self.cost, now)

    def validate(self) -> None:
        """Raise AssertionError if parts of the state contradict each other."""
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
            view.validate(self.contexts.sizes)

    # -- updates --------------------------------------------------------------------------------

    def _forgive(self, group: Group) -> None:
        """Allow new attempts at contexts that were given up: they have been requested anew."""
        for context in self.failures.forgive(group.contexts):
            for view in self.workers.values():
                if view.tiers.get(context) is Tier.FAILED:
                    del view.tiers[context]

    def _park_work(self, work: Work, now: float) -> None:
        # Work of an open run is no new request: the run asked before its contexts were given up.
        if self.failures.given_up and not self.runs.contexts().intersection(work.group.contexts):
            self._forgive(work.group)
        was_known = (
            self._end_work(work.key, is_finished=False) or self._unpark_work(work.key) is not None
        )
        if not was_known:
            self.runs.record_submitted(work)
        if self.waiting.add(work):
            self.has_new_work = True
            self.moved_at[work.group] = now
        self.shares.add_work(work.group.client)

    def _unpark_work(self, key: object) -> Work | None:
        work = self.waiting.remove(key)
        if work is not None:
            self.shares.remove_work(work.group.client)
        return work

    def _assign_work(self, key: object, worker: str, now: float) -> None:
        view, work = self.workers[worker], self._unpark_work(key)
        assert work is not None
        if view.reserved_for == work.group:
            view.reserved_for = None
        view.give(work, now)
        self.moved_at[work.group] = now
        self.placed[key] = worker
        row_s = self.cost.row_s(work.group.costs, worker, view.device)
        self.shares.charge(work.group.client, work.n_rows * row_s if row_s else 0.0)

    def _end_work(self, key: object, is_finished: bool) -> bool:
        """Take work off its worker; return whether it was assigned to one."""
        worker = self.placed.pop(key, None)
        if worker is None:
            return False
        view = self.workers[worker]
        work = view.take(key)
        self.changed[worker] = None
        if is_finished:
            # Part of a retry may be journalled already, so its duration says nothing of its rows.
            n_rows = 0.0 if work.is_again else work.n_rows
            view.finished[work.group] = view.finished.get(work.group, 0.0) + n_rows
        return True

    def _touch(self, key: object, now: float) -> None:
        """Record that the contexts of assigned work are in use at `now`."""
        view = self.workers.get(self.placed.get(key, ""))
        if view is not None:
            for context in view.running[key].group.contexts:
                view.used_at[context] = now

    def _add_worker(self, event: WorkerJoined, now: float) -> None:
        # The same address can join again before its loss is reported.
        self._remove_worker(event.worker, True, now)
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
        self.pools.setdefault(pool, Lifetimes()).add_worker(now)
        self.changed[event.worker] = None
        for context in self.failures.charge_process_ends(view.host, self.contexts.names, now):
            self._set_tier(view, context, Tier.FAILED)

    def _remove_worker(self, worker: str, is_lost: bool, now: float) -> None:
        view = self.workers.pop(worker, None)
        if view is None:
            return
        # Notice of preemption makes a graceful departure a loss: the machine was taken away.
        self.pools[view.pool].remove_worker(view.joined_at, now, is_lost or view.is_draining)
        for context in view.begun:
            self.failures.record_process_end(view.host, context, now)
        self.cost.forget_worker(worker)
        self.failures.remove_worker(worker)
        self.changed.pop(worker, None)
        self.roomy.pop(worker, None)
        for key in view.running:
            del self.placed[key]

    def _report_residency(self, report: ResidencyReported, now: float) -> None:
        view = self.workers.get(report.worker)
        if view is None:
            return
        self.changed[view.address] = None
        was_requested = report.context in view.loading_since
        if report.tier is Tier.FAILED and not was_requested:
            # A task loaded it outside the gate's control. Work that waits here may still try.
            self._set_tier(view, report.context, Tier.ABSENT)
            return
        self._set_tier(view, report.context, report.tier)
        if report.tier is not Tier.DEVICE:
            view.evicting.pop(report.context, None)
        if report.n_bytes:
            self._resize(report.context, report.n_bytes)
            self.contexts.measured.add(report.context)
        if report.device_bytes is not None:
            view.device_bytes = report.device_bytes
        if report.tier is Tier.LOADING:
            view.begun.add(report.context)
        else:
            view.begun.discard(report.context)
            view.loading_since.pop(report.context, None)
        if report.tier is Tier.DEVICE:
            view.used_at[report.context] = view.warm_since[report.context] = now
            self.failures.record_load(view.address, view.host, report.context)
            self.contexts.observe_warm(view, report, self.cost)
        if report.tier is Tier.FAILED:
            has_loaded = self.cost.has_loaded(report.context)
            self.failures.record_failure(view.address, view.host, report, has_loaded, now)

    def _set_tier(self, view: WorkerView, context: str, tier: Tier) -> None:
        view.set_tier(context, tier, self.contexts.sizes.get(context, 0))

    def _resize(self, context: str, n_bytes: int) -> None:
        grown = n_bytes - self.contexts.sizes.get(context, 0)
        self.contexts.sizes[context] = n_bytes
        for view in self.workers.values():
            if view.tiers.get(context) in ON_DEVICE:
                view.taken_bytes += grown
