"""The gate's picture of the world: workers, residencies, waiting and running work."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from dask_pcm.scheduling.cost import CostModel
from dask_pcm.scheduling.events import (
    Action,
    Assign,
    ContextDeclared,
    Cool,
    Event,
    Fail,
    GivenUp,
    Group,
    Leave,
    ResidencyReported,
    Restarted,
    RunClosed,
    RunReported,
    Standing,
    Warm,
    Work,
    WorkEnded,
    WorkerJoined,
    WorkerLeft,
    WorkerPaused,
    WorkParked,
    WorkWithdrawn,
)

#: How a load fails that ends its process, or whose process is ended meanwhile.
END_OF_PROCESS = "end of process"
#: A process that a nanny started again is back within so many seconds.
_BACK_S = 60.0
#: Standings that take room on a device.
_THERE = (Standing.WARM, Standing.LOADING)


@dataclass(slots=True)
class WorkerView:
    """A worker as the gate sees it."""

    address: str
    n_lanes: int
    device_bytes: int | None = None
    host: str = ""
    is_paused: bool = False
    #: What is cold has none.
    standings: dict[str, Standing] = field(default_factory=dict)
    #: What takes room on the device, as far as sizes are known.
    taken_bytes: int = 0
    running: dict[object, Work] = field(default_factory=dict)
    #: Rows on their way or in work, by group.
    n_rows: dict[Group, float] = field(default_factory=dict)
    #: When what is running now began to be worked on: the last finish, or the first assignment.
    busy_since: float = 0.0
    #: Rows finished since `busy_since`, by group; turned into costs by ``GateState.settle``.
    finished: dict[Group, float] = field(default_factory=dict)
    #: When each load that is under way was asked for.
    loading_since: dict[str, float] = field(default_factory=dict)
    #: Those of them that the worker has begun.
    begun: set[str] = field(default_factory=set)
    #: How long each was expected to take.
    loading_s: dict[str, float] = field(default_factory=dict)
    #: When work that needs a context was last begun or ended here, or the context became warm.
    used_at: dict[str, float] = field(default_factory=dict)
    #: Since when each context has been warm.
    warm_since: dict[str, float] = field(default_factory=dict)
    #: Contexts that are to make room as soon as what needs them here has ended, and for whom.
    leaving: dict[str, Group] = field(default_factory=dict)

    def serves(self, contexts: tuple[str, ...]) -> bool:
        """Whether work that needs these may be sent here now."""
        return self.holds(contexts) and not self.leaving.keys() & set(contexts)

    def in_use(self) -> set[str]:
        """Contexts that what was sent here needs."""
        return {context for group in self.n_rows for context in group.contexts}

    def holds(self, contexts: tuple[str, ...]) -> bool:
        return all(self.standings.get(context) is Standing.WARM for context in contexts)

    def missing(self, contexts: tuple[str, ...]) -> tuple[str, ...]:
        """Of `contexts`, those neither warm nor loading."""
        return tuple(c for c in contexts if self.standings.get(c) not in _THERE)


@dataclass(slots=True)
class Expected:
    """What a run will still submit."""

    group: Group
    n_rows: float
    n_units: int


@dataclass(slots=True)
class GateState:
    """Apply events and actions; ask; validate. No I/O, no clock."""

    cost: CostModel = field(default_factory=CostModel)
    workers: dict[str, WorkerView] = field(default_factory=dict)
    #: Heaps of (priority, order of arrival, key); keys that are no longer in `waiting` are stale.
    queues: dict[Group, list[tuple[tuple[float, ...], int, object]]] = field(default_factory=dict)
    waiting: dict[object, Work] = field(default_factory=dict)
    n_waiting_rows: dict[Group, float] = field(default_factory=dict)
    placed: dict[object, str] = field(default_factory=dict)
    runs: dict[str, Expected] = field(default_factory=dict)
    #: What contexts take on a device, as far as it is known; and what they are called.
    sizes: dict[str, int] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    #: The last error of each context that failed to load; nodes where it has failed since it last
    #: loaded, and how; and which contexts were given up.
    errors: dict[str, str] = field(default_factory=dict)
    failures: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    #: Nodes whose worker ended while it loaded a context, which and when.
    ended_loading: list[tuple[str, str, float]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def apply(self, happening: Event | Action, now: float) -> None:
        """Take in an event, or an action that was carried out, at `now` seconds."""
        match happening:
            case WorkerJoined(worker, n_lanes, device_bytes, host):
                self._lose(worker, now)
                self.workers[worker] = WorkerView(worker, n_lanes, device_bytes, host)
                self._blame(self.workers[worker], now)
            case WorkerLeft(worker):
                self._lose(worker, now)
            case GivenUp(context):
                self.given_up.add(context)
            case WorkerPaused(worker, is_paused):
                if worker in self.workers:
                    self.workers[worker].is_paused = is_paused
            case WorkParked(work):
                self._park(work)
            case WorkEnded(key, is_finished):
                self._use(key, now)
                self._end(key, is_finished)
            case WorkWithdrawn(key) | Fail(key):
                self._end(key, is_finished=False)
                self._unpark(key)
            case ResidencyReported():
                self._report(happening, now)
            case RunReported(run, group, n_rows, n_units):
                if run not in self.runs:
                    self._forgive(group)
                self.runs[run] = Expected(group, n_rows, n_units)
            case RunClosed(run):
                self.runs.pop(run, None)
            case Assign(key, worker):
                self._place(key, worker, now)
                self._use(key, now)
            case Cool(worker, context):
                self._stand(self.workers[worker], context, Standing.LOWERED)
                self.workers[worker].leaving.pop(context, None)
            case Leave(worker, context, group):
                self.workers[worker].leaving[context] = group
            case ContextDeclared(context, name, n_bytes):
                self.names[context] = name
                if n_bytes is not None and context not in self.measured:
                    self._resize(context, n_bytes)
            case Restarted():
                self.errors.clear()
                self.failures.clear()
                self.given_up.clear()
                self.ended_loading.clear()
                for view in self.workers.values():
                    view.begun.clear()
            case Warm(worker, context):
                view = self.workers[worker]
                view.loading_s[context] = self.warm_s(view, context)
                view.loading_since[context] = now
                self._stand(view, context, Standing.LOADING)

    def groups(self) -> list[Group]:
        """Groups with work waiting or expected; the most urgent waiting work first."""
        urgent = []
        for group in list(self.queues):
            work = self.peek(group)
            if work is None:
                del self.queues[group]
            else:
                urgent.append((work.priority, next(self._order), group))
        expected = (run.group for run in self.runs.values() if run.n_rows > 0)
        return list(dict.fromkeys([group for *_, group in sorted(urgent)] + list(expected)))

    def peek(self, group: Group) -> Work | None:
        """The next work of `group`, left where it is."""
        queue = self.queues.get(group, [])
        while queue:
            work = self.waiting.get(queue[0][2])
            if work is not None and work.group == group:
                return work
            heapq.heappop(queue)
        return None

    def rows_ahead(self, group: Group) -> float:
        """Rows of `group` that wait or that a run will submit."""
        expected = sum(run.n_rows for run in self.runs.values() if run.group == group)
        return self.n_waiting_rows.get(group, 0.0) + expected

    def works_ahead(self, group: Group) -> int:
        """Pieces of work of `group` that wait or that a run could submit now."""
        waiting = len(self.queues.get(group, ()))
        return waiting + sum(run.n_units for run in self.runs.values() if run.group == group)

    def keys(self, group: Group) -> list[object]:
        """Keys of the work of `group` that waits, the next one first."""
        queued = dict.fromkeys(key for *_, key in sorted(self.queues.get(group, ())))
        works = ((key, self.waiting.get(key)) for key in queued)
        return [key for key, work in works if work is not None and work.group == group]

    def candidates(self, group: Group) -> list[WorkerView]:
        """Workers that may take work of `group`, warm or not."""
        addresses = self.workers if group.allowed is None else group.allowed & self.workers.keys()
        views = [self.workers[address] for address in addresses]
        return [view for view in views if not view.is_paused]

    def given_s(self, view: WorkerView) -> float | None:
        """Learned seconds of all that `view` was given and has not ended; None if not known."""
        total = 0.0
        for group, n_rows in view.n_rows.items():
            row_s = self.cost.row_s(group, view.address)
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
        return still_s(seconds, now - view.busy_since)

    def row_s(self, group: Group, view: WorkerView, now: float) -> float | None:
        """Learned seconds a row; before that, at least what the first rows have taken so far."""
        learned = self.cost.row_s(group, view.address)
        if learned is not None:
            return learned
        running = view.n_rows.get(group)
        return (now - view.busy_since) / running if running else None

    def free_bytes(self, view: WorkerView) -> float:
        """What is left of a worker's device, as far as sizes are known."""
        if view.device_bytes is None:
            return float("inf")
        return view.device_bytes - view.taken_bytes

    def warm_s(self, view: WorkerView, context: str) -> float:
        """Estimated seconds to bring a context to a worker's device."""
        if view.standings.get(context) is Standing.LOWERED:
            return self.cost.restore_s(context)
        return self.cost.load_s(context)

    def settle(self, now: float) -> None:
        """Turn what finished since the last call into costs.

        A worker is one server: while it has work, the time between two finishes is what the
        second took, whichever lane it ran in. Finishes that arrive together share the time.
        """
        for view in self.workers.values():
            if not view.finished:
                continue
            seconds, n_rows = now - view.busy_since, sum(view.finished.values())
            for group, done in view.finished.items():
                self.cost.observe_rows(group, view.address, seconds * done / n_rows, done)
            view.finished.clear()
            view.busy_since = now

    def validate(self) -> None:
        """Raise AssertionError where the picture contradicts itself."""
        assert not self.waiting.keys() & self.placed.keys()
        running = {key: view.address for view in self.workers.values() for key in view.running}
        assert running == self.placed, (running, self.placed)
        for group in self.queues:
            rows = sum(work.n_rows for work in self.waiting.values() if work.group == group)
            assert abs(rows - self.n_waiting_rows.get(group, 0.0)) < 1e-6, group
        queued = {key for queue in self.queues.values() for *_, key in queue}
        assert self.waiting.keys() <= queued
        for view in self.workers.values():
            assert view.n_rows.keys() == {work.group for work in view.running.values()}
            there = [c for c, standing in view.standings.items() if standing in _THERE]
            assert view.taken_bytes == sum(self.sizes.get(c, 0) for c in there), view.address
            assert Standing.COLD not in view.standings.values(), view.address
            for context in view.leaving:
                assert view.standings.get(context) is Standing.WARM, (view.address, context)

    def _forgive(self, group: Group) -> None:
        """Somebody asks anew for contexts that were given up: they are tried again."""
        for context in self.given_up.intersection(group.contexts):
            self.given_up.discard(context)
            self.failures.pop(context, None)
            for view in self.workers.values():
                if view.standings.get(context) is Standing.FAILED:
                    del view.standings[context]

    def _park(self, work: Work) -> None:
        expected = {context for run in self.runs.values() for context in run.group.contexts}
        if not expected.intersection(work.group.contexts):
            self._forgive(work.group)
        self._end(work.key, is_finished=False)
        self._unpark(work.key)
        self.waiting[work.key] = work
        entry = (work.priority, next(self._order), work.key)
        heapq.heappush(self.queues.setdefault(work.group, []), entry)
        self.n_waiting_rows[work.group] = self.n_waiting_rows.get(work.group, 0.0) + work.n_rows

    def _unpark(self, key: object) -> Work | None:
        work = self.waiting.pop(key, None)
        if work is not None:
            self.n_waiting_rows[work.group] -= work.n_rows
            if self.n_waiting_rows[work.group] < 1e-6:  # the last one; floats need not cancel
                del self.n_waiting_rows[work.group]
        return work

    def _place(self, key: object, worker: str, now: float) -> None:
        view, work = self.workers[worker], self._unpark(key)
        assert work is not None
        if not view.running:
            view.busy_since = now
        view.running[key] = work
        view.n_rows[work.group] = view.n_rows.get(work.group, 0.0) + work.n_rows
        self.placed[key] = worker

    def _end(self, key: object, is_finished: bool) -> None:
        worker = self.placed.pop(key, None)
        if worker is None:
            return
        view = self.workers[worker]
        work = view.running.pop(key)
        view.n_rows = {}
        for other in view.running.values():
            view.n_rows[other.group] = view.n_rows.get(other.group, 0.0) + other.n_rows
        if is_finished:
            view.finished[work.group] = view.finished.get(work.group, 0.0) + work.n_rows

    def _use(self, key: object, now: float) -> None:
        view = self.workers.get(self.placed.get(key, ""))
        if view is not None:
            view.used_at.update(dict.fromkeys(view.running[key].group.contexts, now))

    def _lose(self, worker: str, now: float) -> None:
        view = self.workers.pop(worker, None)
        if view is not None:
            self.ended_loading += [(view.host, context, now) for context in view.begun]
            self.cost.forget_worker(worker)
            for key in view.running:
                del self.placed[key]

    def _blame(self, view: WorkerView, now: float) -> None:
        """A worker is back on a node where one has just ended while it loaded: that has failed.

        What was lost with its node is not: nobody comes back from there so soon.
        """
        recent = [ended for ended in self.ended_loading if now - ended[2] < _BACK_S]
        self.ended_loading = [ended for ended in recent if ended[0] != view.host]
        for context in dict.fromkeys(context for host, context, _ in recent if host == view.host):
            name = self.names.get(context, context)
            self.errors[context] = (
                f"The worker process ended while it loaded context {name!r}: killed for its memory,"
                " or by a crash of native code. What the worker logged may say more."
            )
            self._stand(view, context, Standing.FAILED)
            self.failures.setdefault(context, []).append((view.host, END_OF_PROCESS))

    def _report(self, report: ResidencyReported, now: float) -> None:
        view = self.workers.get(report.worker)
        if view is None:
            return
        is_asked = report.context in view.loading_since
        if report.standing is Standing.FAILED and not is_asked:
            # A task has loaded it where the gate does not see: whoever asks here has it tried.
            self._stand(view, report.context, Standing.COLD)
            return
        self._stand(view, report.context, report.standing)
        if report.standing is not Standing.WARM:
            view.leaving.pop(report.context, None)
        if report.n_bytes:
            self._resize(report.context, report.n_bytes)
            self.measured.add(report.context)
        if report.device_bytes is not None:
            view.device_bytes = report.device_bytes
        if report.standing is Standing.LOADING:
            view.begun.add(report.context)
        else:
            view.begun.discard(report.context)
            view.loading_since.pop(report.context, None)
        if report.standing is Standing.WARM:
            view.used_at[report.context] = view.warm_since[report.context] = now
            self.failures.pop(report.context, None)
            if report.seconds:
                self.cost.observe_warm(report.context, report.seconds, report.is_built)
        if report.standing is Standing.FAILED:
            failure = (view.host, report.kind)
            self.failures.setdefault(report.context, []).append(failure)
            self.errors[report.context] = report.error or "no reason was given"

    def _stand(self, view: WorkerView, context: str, standing: Standing) -> None:
        n_bytes = self.sizes.get(context, 0)
        before = view.standings.pop(context, Standing.COLD)
        if standing is not Standing.COLD:
            view.standings[context] = standing
        view.taken_bytes += n_bytes * ((standing in _THERE) - (before in _THERE))

    def _resize(self, context: str, n_bytes: int) -> None:
        grown = n_bytes - self.sizes.get(context, 0)
        self.sizes[context] = n_bytes
        for view in self.workers.values():
            if view.standings.get(context) in _THERE:
                view.taken_bytes += grown


def still_s(expected_s: float, elapsed_s: float) -> float:
    """Seconds that something is still expected to take; overdue, as long again as it is overdue.

    So that nobody waits for ever for what hangs, thinking that it must end any moment.

    >>> still_s(5.0, 2.0), still_s(5.0, 15.0)
    (3.0, 10.0)
    """
    return abs(expected_s - elapsed_s)
