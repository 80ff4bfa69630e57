"""The gate's state: the workers and their work, and the parts that events are passed on to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dask_pcm.scheduling.actions import (
    Action,
    Assign,
    Fail,
    Load,
    LoadsGivenUp,
    Offload,
    Quarantine,
    Vacate,
)
from dask_pcm.scheduling.events import (
    ContextDeclared,
    Event,
    Group,
    HostPlan,
    HostsPlanned,
    MemoryNeeded,
    PoolsDeclared,
    ProcessEnded,
    QuestionEnded,
    QuestionPlaced,
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
from dask_pcm.scheduling.learned.failures import Failures
from dask_pcm.scheduling.state.ahead import WorkAhead
from dask_pcm.scheduling.state.contexts import ContextTable
from dask_pcm.scheduling.state.estimates import Estimates
from dask_pcm.scheduling.state.plans import Plans
from dask_pcm.scheduling.state.worker import WorkerView, joined
from dask_pcm.tiers import ON_DEVICE, Tier


@dataclass(slots=True)
class GateState:
    """What the policy knows; events and actions change it, rules read it.

    Pure: no I/O and no clock of its own. Times are seconds of the caller's clock. What
    was reported of workers and their work is here; the other parts each own their data.
    """

    workers: dict[str, WorkerView] = field(default_factory=dict)
    #: Worker of each piece of assigned work, by key.
    placed: dict[object, str] = field(default_factory=dict)
    ahead: WorkAhead = field(default_factory=WorkAhead)
    contexts: ContextTable = field(default_factory=ContextTable)
    failures: Failures = field(default_factory=Failures)
    estimates: Estimates = field(init=False)
    plans: Plans = field(default_factory=Plans)
    #: What contexts may take on the devices of a worker of each pool, or None, by pool; empty where
    #: the cluster has no pools, or has not announced them.
    pools: Mapping[str, int | None] = field(default_factory=dict)
    #: Which contexts should go on which hosts; None where no context needs a neighbour's memory.
    placement: HostPlan | None = None

    def __post_init__(self) -> None:
        self.estimates = Estimates(contexts=self.contexts)

    def apply(self, happening: Event | Action, now: float) -> None:
        """Update the state by an event, or by an action that is being carried out."""
        # The most frequent come first: a large cluster has thousands of events a second.
        match happening:
            case WorkEnded(key, is_finished):
                self._end_work(key, is_finished, used_at=now)
            case WorkParked(work):
                self._park_work(work, now)
            case WorkHandedOver(key, n_rows) if key in self.placed:
                worker = self.placed[key]
                self.workers[worker].hand_over(key, n_rows)
                self.plans.changed[worker] = None
            case WorkRejoined(key) if key in self.placed:
                self.workers[self.placed[key]].take_back(key, now)
            case WorkWithdrawn(key) | Fail(key):
                self._end_work(key, is_finished=False)
                self.ahead.unpark(key)
            case ResidencyReported(worker) if worker in self.workers:
                self._report_residency(self.workers[worker], happening, now)
            case WorkerJoined():
                self._add_worker(happening, now)
            case WorkerLeft(worker, is_lost):
                self._remove_worker(worker, is_lost, now)
            case WorkerPaused(worker, is_paused) if worker in self.workers:
                self.workers[worker].is_paused = is_paused
                self.plans.changed[worker] = None
            case WorkerDraining(worker, seconds, is_preempted) if worker in self.workers:
                view = self.workers[worker]
                view.is_preempted |= is_preempted
                view.is_draining, view.ends_at = True, min(view.ends_at, now + seconds)
            case RunReported(run, group):
                if run not in self.ahead.runs:
                    self._forgive(group)
                self.ahead.runs.report(happening)
            case RunClosed(run):
                self.ahead.runs.close(run)
            case ContextDeclared(context):
                n_bytes = self.contexts.declare(happening)
                if n_bytes is not None:
                    self._resize(context, n_bytes)
            case QuestionPlaced(worker, context) if worker in self.workers:
                self.workers[worker].begin_question(context, now)
            case QuestionEnded(worker, context) if worker in self.workers:
                self.workers[worker].end_question(context, now)
                self.plans.changed[worker] = None
            case PoolsDeclared(device_bytes):
                self.pools = device_bytes
            case MemoryNeeded(context, n_bytes):
                needs = self.contexts.needs
                needs[context] = max(needs.get(context, 0), n_bytes)
            case HostsPlanned(plan):
                self.placement = plan
            case Restarted():
                self.failures.clear()
                for view in self.workers.values():
                    view.begun.clear()
            case ProcessEnded(worker, host, contexts):
                self._charge_loads(self.workers.get(worker), host, contexts)
            case Assign() | Load() | Offload() | Vacate() | Quarantine() | LoadsGivenUp():
                self._apply_action(happening, now)

    def commit(self, action: Action, now: float, *numbers: float) -> None:
        """Decide on an action: apply it, return it to the caller, and record its numbers."""
        self.apply(action, now)
        self.plans.record(action, now, numbers)

    # -- which workers --------------------------------------------------------------------------

    def candidates(self, group: Group) -> list[WorkerView]:
        """Workers that may run work of `group`, warm or not."""
        addresses = self.workers if group.allowed is None else group.allowed & self.workers.keys()
        workers = (self.workers[address] for address in addresses)
        bad_hosts = self.failures.quarantined
        return [w for w in workers if not w.is_paused and w.host not in bad_hosts]

    def can_serve(self, view: WorkerView, group: Group) -> bool:
        """Whether work of `group` may be assigned to a worker, once it has a free lane."""
        return (
            not view.is_paused
            and (group.allowed is None or view.address in group.allowed)
            and view.serves(group.contexts)
            and view.host not in self.failures.quarantined
        )

    # -- consistency ----------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise AssertionError if parts of the state contradict each other."""
        self.ahead.validate()
        self.estimates.validate(self.workers.values())
        self.plans.validate(self.workers)
        assert not self.ahead.waiting.works.keys() & self.placed.keys()
        views = self.workers.values()
        placed = {key: view.address for view in views for key in (*view.running, *view.waiting)}
        assert placed == self.placed, (placed, self.placed)
        for view in self.workers.values():
            view.validate(self.contexts.sizes)

    # -- updates --------------------------------------------------------------------------------

    def _apply_action(self, action: Action, now: float) -> None:
        match action:
            case Assign(key, worker):
                self._assign_work(key, worker, now)
            case Load(worker, context):
                seconds = self.estimates.warm_s(self.workers[worker], context)
                self.workers[worker].load(context, self.contexts.size(context), seconds, now)
                self.plans.moved_at[context] = now
            case Offload(worker, context):
                self.workers[worker].set_tier(context, Tier.HOST, self.contexts.size(context))
                self.workers[worker].evicting.pop(context, None)
            case Vacate(worker, context, group):
                self.workers[worker].evicting[context] = group
                self.plans.moved_at[group] = now
            case Quarantine(host, seconds, error):
                self.failures.quarantine(host, now + seconds, error)
            case LoadsGivenUp(context):
                self.failures.given_up.add(context)

    def _forgive(self, group: Group) -> None:
        """Allow new attempts at contexts that were given up: they have been requested anew."""
        for context in self.failures.forgive(group.contexts):
            for view in self.workers.values():
                if view.tiers.get(context) is Tier.FAILED:
                    del view.tiers[context]

    def _park_work(self, work: Work, now: float) -> None:
        # Work of an open run is no new request: the run asked before its contexts were given up.
        given_up = self.failures.given_up
        if given_up and not self.ahead.runs.contexts().intersection(work.group.contexts):
            self._forgive(work.group)
        was_known = (
            self._end_work(work.key, is_finished=False) or self.ahead.unpark(work.key) is not None
        )
        if self.ahead.park(work, was_known):
            self.plans.has_new_work = True
            self.plans.moved_at[work.group] = now

    def _assign_work(self, key: object, worker: str, now: float) -> None:
        view, work = self.workers[worker], self.ahead.unpark(key)
        assert work is not None
        if view.reserved_for == work.group:
            view.reserved_for = None
        view.give(work, now)
        view.used_at.update(dict.fromkeys(work.group.contexts, now))
        self.plans.moved_at[work.group] = now
        self.placed[key] = worker
        row_s = self.estimates.cost.row_s(work.group.costs, worker, view.device)
        self.ahead.shares.charge(work.group.client, work.n_rows * row_s if row_s else 0.0)

    def _end_work(self, key: object, is_finished: bool, used_at: float | None = None) -> bool:
        """Take work off its worker; return whether it was assigned to one.

        `used_at` is when it last used its contexts; None for work that is taken back.
        """
        worker = self.placed.pop(key, None)
        if worker is None:
            return False
        view = self.workers[worker]
        work = view.take(key)
        self.plans.changed[worker] = None
        if used_at is not None:
            view.used_at.update(dict.fromkeys(work.group.contexts, used_at))
        if is_finished:
            # Part of a retry may be journalled already, so its duration says nothing of its rows.
            n_rows = 0.0 if work.is_again else work.n_rows
            view.finished[work.group] = view.finished.get(work.group, 0.0) + n_rows
        return True

    def _add_worker(self, event: WorkerJoined, now: float) -> None:
        # The same address can join again before its loss is reported.
        self._remove_worker(event.worker, True, now)
        view = self.workers[event.worker] = joined(event, now)
        self.estimates.add_worker(view.pool, now)
        self.plans.changed[event.worker] = None

    def _remove_worker(self, worker: str, is_lost: bool, now: float) -> None:
        view = self.workers.pop(worker, None)
        if view is None:
            return
        for context in view.begun & view.loading_since.keys():  # those that were asked for
            loaded_s = now - view.loading_since[context]
            self.failures.record_end_of_time(context, view.pool, view.limit_s, loaded_s)
        self.estimates.remove_worker(view, is_lost, now)
        self.failures.remove_worker(worker)
        self.plans.forget_worker(worker)
        for key in (*view.running, *view.waiting):
            del self.placed[key]

    def _charge_loads(
        self, successor: WorkerView | None, host: str, contexts: Iterable[str]
    ) -> None:
        """Loads have ended a process; the worker in its place does not try them at once."""
        for context in contexts:
            name = self.contexts.names.get(context, context)
            self.failures.record_process_end(host, context, name)
            if successor is not None and context not in successor.tiers:
                successor.set_tier(context, Tier.FAILED, self.contexts.size(context))
                self.plans.changed[successor.address] = None

    def _report_residency(self, view: WorkerView, report: ResidencyReported, now: float) -> None:
        context, tier = report.context, report.tier
        self.plans.changed[view.address] = None
        if tier is Tier.FAILED and context not in view.loading_since:
            # A task loaded it outside the gate's control. Work that waits here may still try.
            view.set_tier(context, Tier.ABSENT, self.contexts.size(context))
            return
        view.report_tier(context, tier, self.contexts.size(context), now)
        if report.n_bytes:
            self._resize(context, report.n_bytes)
            self.contexts.measured.add(context)
        if report.device_bytes is not None:
            view.device_bytes = report.device_bytes
        view.serves_rows.pop(context, None)
        if tier is Tier.DEVICE:
            if report.n_rows:
                view.serves_rows[context] = report.n_rows
            self.failures.record_load(view.address, view.host, context)
            self.contexts.observe_warm(view, report, self.estimates.cost)
        if tier is Tier.FAILED:
            has_loaded = self.estimates.cost.has_loaded(context)
            self.failures.record_failure(view.address, view.host, report, has_loaded, now)

    def _resize(self, context: str, n_bytes: int) -> None:
        grown = n_bytes - self.contexts.size(context)
        self.contexts.sizes[context] = n_bytes
        for view in self.workers.values():
            if view.tiers.get(context) in ON_DEVICE:
                view.taken_bytes += grown
