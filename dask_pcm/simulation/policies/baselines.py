"""The systems that the papers measure, each with tasks of a fixed size.

- ``naive``: every task fetches the files from the shared store, unpacks them and loads the model.
- ``partial``: files stay on the worker's disk; every task loads the model.
- ``pervasive``: a library on each worker loads it once and serves task after task, as TaskVine does
  it: files come from the manager and then from worker to worker; a task is committed to any worker
  that is free, warm or not, and waits there; a library that failed is started again and again; a
  worker's whole task is lost with it.
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
    NAIVE = "naive"
    PARTIAL = "partial"
    PERVASIVE = "pervasive"


@dataclass(slots=True, eq=False)
class _Task:
    run: RunSpec
    n_rows: int


@dataclass(slots=True, eq=False)
class _Hand:
    """A worker as the manager sees it.

    Attributes
    ----------
    library
        Contexts that its library holds.
    """

    worker: Worker
    task: _Task | None = None
    began_s: float | None = None
    library: tuple[str, ...] = ()
    n_failures: int = 0


class Manager:
    """Hands tasks to workers, first come, first served."""

    def __init__(self, world: World, kind: Baseline, seed: int) -> None:
        self._world = world
        self._kind = kind
        self._settings = world.scenario.baselines
        if kind is Baseline.PERVASIVE:
            world.staging = FromPeers(world.links, self._settings, seed)
        else:
            world.staging = FromStore(world.links)
        self._tasks: deque[_Task] = deque()
        self._hands: dict[str, _Hand] = {}
        self._idle: dict[str, _Hand] = {}  # in the order in which they became so
        self._n_left = world.scenario.n_rows
        self._next_dispatch_s = 0.0

    @property
    def is_done(self) -> bool:
        return self._n_left == 0

    def begin(self) -> None:
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
        self._hands[worker.name] = hand = _Hand(worker)
        self._free(hand)

    def told(self, worker: Worker) -> None:
        """No use is made of notice."""

    def left(self, worker: Worker) -> None:
        hand = self._hands.pop(worker.name)
        self._idle.pop(worker.name, None)
        if hand.task is not None:
            if hand.began_s is not None:
                now, run = self._world.clock.now, hand.task.run
                self._world.record.span(worker.name, WORK, hand.began_s, now)
                seconds = now - hand.began_s
                _, n_begun = self._world.rows_by(worker, run, hand.task.n_rows, seconds)
                self._world.record.lost(n_begun, seconds)
            self._take_back(hand)

    def _take_back(self, hand: _Hand) -> None:
        if hand.task is not None:
            self._tasks.appendleft(hand.task)
            hand.task = None
            self._dispatch()

    def _free(self, hand: _Hand) -> None:
        if hand.worker.is_here:
            self._idle[hand.worker.name] = hand
            self._dispatch()

    def _dispatch(self) -> None:
        """Commit tasks to whoever is free, so many a second."""
        while self._tasks and self._idle:
            hand = self._idle.pop(next(iter(self._idle)))
            hand.task = self._tasks.popleft()
            self._world.record.n_dispatches += 1
            at_s = max(self._world.clock.now, self._next_dispatch_s)
            self._next_dispatch_s = at_s + 1.0 / self._settings.dispatches_per_s
            wait_s = at_s - self._world.clock.now + self._settings.task_s
            self._world.later(hand.worker, wait_s, functools.partial(self._prepare, hand))

    # -- tasks ----------------------------------------------------------------------------------

    def _prepare(self, hand: _Hand) -> None:
        assert hand.task is not None
        contexts = hand.task.run.contexts
        if self._kind is Baseline.PERVASIVE and hand.library == contexts:
            self._infer(hand)
            return
        hand.library = ()
        self._load(hand, contexts, contexts)

    def _load(self, hand: _Hand, contexts: tuple[str, ...], left: tuple[str, ...]) -> None:
        """One context after another."""
        if not left:
            hand.library = contexts
            self._infer(hand)
            return

        def loaded(is_built: bool) -> None:
            if is_built:
                self._load(hand, contexts, left[1:])
            else:
                self._fail(hand)

        keeps_files = self._kind is not Baseline.NAIVE
        self._world.load(hand.worker, left[0], loaded, keeps_files)

    def _fail(self, hand: _Hand) -> None:
        """The task goes to others; a library is started again, other loads as there is a task."""
        self._take_back(hand)
        hand.n_failures += 1
        if self._kind is not Baseline.PERVASIVE:
            self._free(hand)
        elif hand.n_failures < self._settings.n_retries:
            self._world.later(hand.worker, self._settings.retry_s, lambda: self._free(hand))

    def _infer(self, hand: _Hand) -> None:
        assert hand.task is not None
        hand.began_s = self._world.clock.now
        self._world.record.began(hand.worker.name, hand.began_s)
        seconds = self._world.infer_s(hand.worker, hand.task.run, hand.task.n_rows)
        self._world.later(hand.worker, seconds, lambda: self._end(hand))

    def _end(self, hand: _Hand) -> None:
        assert hand.task is not None and hand.began_s is not None
        now = self._world.clock.now
        self._world.record.span(hand.worker.name, WORK, hand.began_s, now)
        self._world.record.done(hand.task.n_rows, now)
        self._n_left -= hand.task.n_rows
        hand.task = hand.began_s = None
        self._free(hand)
