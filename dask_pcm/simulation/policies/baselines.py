"""The baselines: the systems that the papers measure, with tasks of a fixed size.

- ``naive``: every task fetches the files from the shared store, unpacks them and loads the model.
- ``partial``: files stay on the worker's disk; every task loads the model.
- ``pervasive``: a library on each worker loads the model once and serves many tasks, as in
  TaskVine. Files come from the manager, then from peers. A task is assigned to any free worker,
  warm or not, and waits there. A library that failed is restarted. A lost worker loses its whole
  task.
"""

from __future__ import annotations

import enum
import functools
from collections import deque
from dataclasses import dataclass

from dask_pcm.simulation.scenario.scenario import RunSpec
from dask_pcm.simulation.world.record import WORK
from dask_pcm.simulation.world.staging import FromPeers, FromStore
from dask_pcm.simulation.world.world import Worker, World


class Baseline(enum.Enum):
    """A baseline system; see the module."""

    NAIVE = "naive"
    PARTIAL = "partial"
    PERVASIVE = "pervasive"


@dataclass(slots=True, eq=False)
class _Task:
    """A task: some rows of a run."""

    run: RunSpec
    n_rows: int


@dataclass(slots=True, eq=False)
class _Slot:
    """The manager's view of a worker.

    Attributes
    ----------
    began_s
        When its task began to infer; None before that.
    library
        Contexts that its library holds.
    """

    worker: Worker
    task: _Task | None = None
    began_s: float | None = None
    library: tuple[str, ...] = ()
    n_failures: int = 0


class Manager:
    """Assigns tasks to workers, first come, first served."""

    def __init__(self, world: World, kind: Baseline, seed: int) -> None:
        self._world = world
        self._kind = kind
        self._settings = world.scenario.baselines
        if kind is Baseline.PERVASIVE:
            world.staging = FromPeers(world.links, self._settings, seed)
        else:
            world.staging = FromStore(world.links)
        self._tasks: deque[_Task] = deque()
        self._slots: dict[str, _Slot] = {}
        self._idle: dict[str, _Slot] = {}  # in the order in which they became idle
        self._n_left = world.scenario.n_rows
        self._next_dispatch_s = 0.0

    @property
    def is_done(self) -> bool:
        """Whether all rows are done."""
        return self._n_left == 0

    def begin(self) -> None:
        """Schedule the start of each run, by priority."""
        for run in sorted(self._world.scenario.runs, key=lambda run: -run.priority):
            self._world.clock.at(run.starts_s, functools.partial(self._open, run))

    def _open(self, run: RunSpec) -> None:
        n_whole, rest = divmod(run.n_rows, run.task_rows)
        self._tasks.extend(_Task(run, run.task_rows) for _ in range(n_whole))
        if rest:
            self._tasks.append(_Task(run, rest))
        self._dispatch()

    # -- workers --------------------------------------------------------------------------------

    def joined(self, worker: Worker) -> None:
        """A worker has joined, and is idle."""
        self._slots[worker.name] = slot = _Slot(worker)
        self._free(slot)

    def draining(self, worker: Worker) -> None:
        """Notice of preemption is ignored."""

    def left(self, worker: Worker) -> None:
        """A worker has left; its task goes back to the head of the queue."""
        slot = self._slots.pop(worker.name)
        self._idle.pop(worker.name, None)
        if slot.task is not None:
            if slot.began_s is not None:
                now, run = self._world.clock.now, slot.task.run
                self._world.record.span(worker.name, WORK, slot.began_s, now)
                seconds = now - slot.began_s
                _, n_begun = self._world.rows_by(worker, run, slot.task.n_rows, seconds)
                self._world.record.lost(n_begun, seconds)
            self._take_back(slot)

    def _take_back(self, slot: _Slot) -> None:
        if slot.task is not None:
            self._tasks.appendleft(slot.task)
            slot.task = None
            self._dispatch()

    def _free(self, slot: _Slot) -> None:
        if slot.worker.is_here:
            self._idle[slot.worker.name] = slot
            self._dispatch()

    def _dispatch(self) -> None:
        """Assign tasks to idle workers, at a limited rate per second."""
        while self._tasks and self._idle:
            # Idle for longest first. Which one is warm plays no part: that is the baseline.
            slot = self._idle.pop(next(iter(self._idle)))
            slot.task = self._tasks.popleft()
            self._world.record.n_dispatches += 1
            # One manager serves all: with many short tasks it is what limits the rate.
            at_s = max(self._world.clock.now, self._next_dispatch_s)
            self._next_dispatch_s = at_s + 1.0 / self._settings.dispatches_per_s
            wait_s = at_s - self._world.clock.now + self._settings.task_s
            self._world.later(slot.worker, wait_s, functools.partial(self._prepare, slot))

    # -- tasks ----------------------------------------------------------------------------------

    def _prepare(self, slot: _Slot) -> None:
        assert slot.task is not None
        contexts = slot.task.run.contexts
        if self._kind is Baseline.PERVASIVE and slot.library == contexts:
            self._infer(slot)
            return
        # A worker keeps one library; another run's ends when the new one begins.
        slot.library = ()
        self._load(slot, contexts, contexts)

    def _load(self, slot: _Slot, contexts: tuple[str, ...], left: tuple[str, ...]) -> None:
        """Load the contexts `left` one after another, then infer."""
        if not left:
            slot.library = contexts
            self._infer(slot)
            return

        def loaded(is_built: bool) -> None:
            if is_built:
                self._load(slot, contexts, left[1:])
            else:
                self._fail(slot)

        keeps_files = self._kind is not Baseline.NAIVE
        self._world.load(slot.worker, left[0], loaded, keeps_files)

    def _fail(self, slot: _Slot) -> None:
        """Requeue the task; restart a library after a delay, free any other worker at once."""
        self._take_back(slot)
        slot.n_failures += 1
        if self._kind is not Baseline.PERVASIVE:
            self._free(slot)
        elif slot.n_failures < self._settings.n_retries:
            self._world.later(slot.worker, self._settings.retry_s, lambda: self._free(slot))

    def _infer(self, slot: _Slot) -> None:
        assert slot.task is not None
        slot.began_s = self._world.clock.now
        self._world.record.began(slot.worker.name, slot.began_s)
        seconds = self._world.infer_s(slot.worker, slot.task.run, slot.task.n_rows)
        self._world.later(slot.worker, seconds, lambda: self._end(slot))

    def _end(self, slot: _Slot) -> None:
        assert slot.task is not None and slot.began_s is not None
        now = self._world.clock.now
        self._world.record.span(slot.worker.name, WORK, slot.began_s, now)
        self._world.record.done(slot.task.n_rows, now)
        self._n_left -= slot.task.n_rows
        slot.task = slot.began_s = None
        self._free(slot)
