"""The simulated cluster: workers join, load, infer and leave, as a policy directs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from dask_pcm.simulation.scenario.scenario import RunSpec, Scenario
from dask_pcm.simulation.world.clock import Clock, Timer
from dask_pcm.simulation.world.links import Links
from dask_pcm.simulation.world.lives import Life
from dask_pcm.simulation.world.record import LOAD, STAGE, Record
from dask_pcm.simulation.world.staging import STORE, StagingPolicy

#: Least quiet time after which a simulation counts as stalled, in seconds.
_STALL_S = 3_600.0


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that has joined.

    Attributes
    ----------
    disk
        Unpacked files on its disk, by (context, number).
    loads
        Start of each load in flight, in simulated seconds.
    """

    life: Life
    is_here: bool = True
    disk: set[tuple[str, int]] = field(default_factory=set)
    loads: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The worker's unique name."""
        return self.life.worker


class Policy(Protocol):
    """A policy under simulation: the cluster reports events, the policy directs workers."""

    @property
    def is_done(self) -> bool:
        """Whether all runs have ended."""

    def begin(self) -> None:
        """The simulation begins."""

    def joined(self, worker: Worker) -> None:
        """A worker has joined."""

    def draining(self, worker: Worker) -> None:
        """A worker has had notice of its end."""

    def left(self, worker: Worker) -> None:
        """A worker has left."""


class World:
    """Worker lifetimes, links, and the durations of loading and inference."""

    def __init__(self, scenario: Scenario, record: Record) -> None:
        self.scenario = scenario
        self.record = record
        self.clock = Clock()
        self.links = Links(self.clock)
        self.links.open(STORE, scenario.store_bytes_s)
        #: Set by the policy.
        self.staging: StagingPolicy
        self._quiet_limit_s = _quiet_limit_s(scenario)
        joins = [at for pool in scenario.pools for at in pool.joins_s or pool.joins_within_s or ()]
        self._all_begun_s = max([run.starts_s for run in scenario.runs] + joins)

    def run(self, policy: Policy, places: Iterable[Iterator[Life]]) -> None:
        """Simulate until all runs end, nothing happens any more, or the scenario ends."""
        for lives in places:
            self._expect(lives, policy)
        policy.begin()
        self.clock.run(lambda: policy.is_done or self._is_over())

    def _is_over(self) -> bool:
        quiet_s = self.clock.now - max(self.record.last_change_s, self._all_begun_s)
        return self.clock.now >= self.scenario.until_s or quiet_s > self._quiet_limit_s

    def _expect(self, lives: Iterator[Life], policy: Policy) -> None:
        """Schedule the next worker of a place."""
        life = next(lives, None)
        if life is not None:
            self.clock.at(life.joins_s, lambda: self._join(life, lives, policy))

    def _join(self, life: Life, lives: Iterator[Life], policy: Policy) -> None:
        worker = Worker(life)
        self.links.open(worker.name, life.link_bytes_s)
        self.record.joined(worker.name, self.clock.now)

        def leave() -> None:
            worker.is_here = False  # first: what was scheduled for it must not happen any more
            self.record.left(worker.name, self.clock.now)
            for since_s in worker.loads.values():
                self.record.load_failed(worker.name, since_s, self.clock.now)
            self.staging.left(worker.name)
            self._expect(lives, policy)
            # Last: the policy may act at once, on a cluster that has no such worker any more.
            policy.left(worker)

        if math.isfinite(life.ends_s):
            self.clock.at(life.ends_s, leave)
        if math.isfinite(life.notice_at_s):
            self.clock.at(life.notice_at_s, lambda: policy.draining(worker))
        policy.joined(worker)

    def later(self, worker: Worker, seconds: float, act: Callable[[], object]) -> Timer:
        """Call `act` in `seconds` seconds, unless the worker has left by then."""
        return self.clock.after(seconds, lambda: act() if worker.is_here else None)

    def load(
        self, worker: Worker, context: str, done: Callable[[bool], object], keeps_files: bool = True
    ) -> None:
        """Stage a context's files, unpack and build it; call `done` with whether it succeeded.

        On a broken worker the load fails after a while, or hangs.
        """
        Load(self, worker, context, done, keeps_files).begin()

    def row_s(self, worker: Worker, run: RunSpec) -> float:
        """Seconds per row of a run on a worker."""
        life = worker.life
        rows_s = sum(self.scenario.contexts[name].row_s[life.device] for name in run.contexts)
        return rows_s * life.slowness

    def infer_s(self, worker: Worker, run: RunSpec, n_rows: int) -> float:
        """Seconds to infer rows of a run on a worker, with the overhead of each call."""
        n_calls = math.ceil(n_rows / run.batch_rows)
        return n_rows * self.row_s(worker, run) + n_calls * self.scenario.overheads.call_s

    def rows_by(self, worker: Worker, run: RunSpec, n_rows: int, seconds: float) -> tuple[int, int]:
        """Of `n_rows`, those in batches finished after `seconds` seconds, and those begun."""
        batch_s = self.infer_s(worker, run, run.batch_rows)
        # The tolerance: a batch that ends right now has ended, despite rounding.
        n_ended = int(seconds / batch_s + 1e-9) * run.batch_rows
        n_begun = math.ceil(seconds / batch_s - 1e-9) * run.batch_rows
        return min(n_ended, n_rows), min(n_begun, n_rows)


def _quiet_limit_s(scenario: Scenario) -> float:
    """Seconds without an event after which the simulation has stalled.

    Longer than any single activity: a task on the slowest device, all workers staging from the
    store at once, or one file over the slowest link.
    """
    task_s = max(
        max(run.task_rows, run.batch_rows) * scenario.effective_row_s(run, pool.device)
        for run in scenario.runs
        for pool in scenario.pools
    )
    sizes = [file.n_bytes for context in scenario.contexts.values() for file in context.files]
    n_workers = sum(pool.n_workers for pool in scenario.pools)
    links = [bytes_s for pool in scenario.pools for bytes_s, _ in pool.link_bytes_s]
    slowest = min(*links, scenario.baselines.slow_bytes_s, scenario.store_bytes_s / n_workers)
    rejoins = [pool.rejoins_after_s or 0.0 for pool in scenario.pools]
    return _STALL_S + 4 * task_s + 4 * sum(sizes) / slowest + max(rejoins)


@dataclass(slots=True, eq=False)
class Load:
    """A load in flight: files are unpacked while others arrive; then the context is built."""

    world: World
    worker: Worker
    context: str
    done: Callable[[bool], object]
    keeps_files: bool
    n_lacking: int = 0

    def begin(self) -> None:
        """Start the load; a broken worker fails it or lets it hang."""
        worker, world = self.worker, self.world
        worker.loads[self.context] = world.clock.now
        broken, files = worker.life.broken, world.scenario.contexts[self.context].files
        if broken is not None:
            # Without a time it hangs: only the policy's own patience ends such a load.
            if broken.fails_after_s is not None:
                world.later(worker, broken.fails_after_s, self._fail)
            return
        lacking = [n for n in range(len(files)) if (self.context, n) not in worker.disk]
        self.n_lacking = len(lacking)
        for number in lacking:
            name, arrived = f"{self.context}/{number}", functools.partial(self._unpack, number)
            world.staging.fetch(worker.name, name, files[number].n_bytes, arrived)
        if not lacking:
            self._build()

    def _unpack(self, number: int) -> None:
        file = self.world.scenario.contexts[self.context].files[number]
        seconds = file.unpack_s[self.worker.life.device]
        self.world.later(self.worker, seconds, lambda: self._unpacked(number))

    def _unpacked(self, number: int) -> None:
        self.n_lacking -= 1
        # Kept although the load may never end: the next one on this worker finds the file.
        if self.keeps_files:
            self.worker.disk.add((self.context, number))
        if not self.n_lacking:
            self._build()

    def _build(self) -> None:
        world, worker = self.world, self.worker
        world.record.span(worker.name, STAGE, worker.loads[self.context], world.clock.now)
        load_s = world.scenario.contexts[self.context].load_s[worker.life.device]
        world.later(worker, load_s, lambda: self._built(load_s))

    def _built(self, load_s: float) -> None:
        now, name = self.world.clock.now, self.worker.name
        self.world.record.span(name, LOAD, now - load_s, now)
        since_s = self.worker.loads.pop(self.context)
        self.world.record.loaded(name, self.context, since_s, now)
        self.done(True)

    def _fail(self) -> None:
        since_s = self.worker.loads.pop(self.context)
        self.world.record.load_failed(self.worker.name, since_s, self.world.clock.now)
        self.done(False)
