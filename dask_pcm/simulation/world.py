"""A world in which workers join and leave, load and infer; a policy has its way in it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from dask_pcm.simulation.clock import Clock, Timer
from dask_pcm.simulation.links import Links
from dask_pcm.simulation.lives import Life
from dask_pcm.simulation.record import LOAD, STAGE, Record
from dask_pcm.simulation.scenario import RunSpec, Scenario
from dask_pcm.simulation.staging import STORE, Staging

#: Nobody has joined and nothing was done for so long: it will not be any more.
_STALL_S = 3_600.0


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that has joined.

    Attributes
    ----------
    disk
        Files that it has, unpacked, by (context, number).
    loads
        Contexts that it loads, and since when.
    """

    life: Life
    is_here: bool = True
    disk: set[tuple[str, int]] = field(default_factory=set)
    loads: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.life.worker


class Policy(Protocol):
    """Who decides what workers do."""

    @property
    def is_done(self) -> bool: ...
    def begin(self) -> None: ...
    def joined(self, worker: Worker) -> None: ...
    def told(self, worker: Worker) -> None:
        """A worker will leave soon."""

    def left(self, worker: Worker) -> None: ...


class World:
    """Workers' lives, links, and what loading and inferring take."""

    def __init__(self, scenario: Scenario, record: Record) -> None:
        self.scenario = scenario
        self.record = record
        self.clock = Clock()
        self.links = Links(self.clock)
        self.links.open(STORE, scenario.store_bytes_s)
        #: Set by the policy: how files come to workers.
        self.staging: Staging

    def run(self, policy: Policy, places: Iterable[Iterator[Life]]) -> None:
        """Let time pass until all is done, all stalls, or the scenario ends."""
        for lives in places:
            self._expect(lives, policy)
        policy.begin()
        self.clock.run(lambda: policy.is_done or self._is_over())

    def _is_over(self) -> bool:
        now = self.clock.now
        return now >= self.scenario.until_s or now - self.record.last_change_s > _STALL_S

    def _expect(self, lives: Iterator[Life], policy: Policy) -> None:
        """The next worker to take a place."""
        life = next(lives, None)
        if life is not None:
            self.clock.at(life.joins_s, lambda: self._join(life, lives, policy))

    def _join(self, life: Life, lives: Iterator[Life], policy: Policy) -> None:
        worker = Worker(life)
        self.links.open(worker.name, life.link_bytes_s)
        self.record.joined(worker.name, self.clock.now)

        def leave() -> None:
            worker.is_here = False
            self.record.left(worker.name, self.clock.now)
            for since_s in worker.loads.values():
                self.record.load_failed(worker.name, since_s, self.clock.now)
            self.staging.left(worker.name)
            self._expect(lives, policy)
            policy.left(worker)

        if math.isfinite(life.ends_s):
            self.clock.at(life.ends_s, leave)
        if math.isfinite(life.told_s):
            self.clock.at(life.told_s, lambda: policy.told(worker))
        policy.joined(worker)

    def later(self, worker: Worker, seconds: float, act: Callable[[], object]) -> Timer:
        """Have something happen on a worker, if it is still there by then."""
        return self.clock.after(seconds, lambda: act() if worker.is_here else None)

    def load(
        self, worker: Worker, context: str, done: Callable[[bool], object], keeps_files: bool = True
    ) -> None:
        """Stage a context's files, unpack them and build it; `done` is told whether that worked.

        Each file is unpacked while others arrive. On a broken worker it fails after a while, or
        never ends.
        """
        spec, life, now = self.scenario.contexts[context], worker.life, self.clock.now
        worker.loads[context] = now
        if life.broken is not None:
            if life.broken.fails_after_s is not None:
                self.later(worker, life.broken.fails_after_s, lambda: finish(False))
            return
        lacking = [n for n in range(len(spec.files)) if (context, n) not in worker.disk]
        n_left = len(lacking)

        def unpacked(number: int) -> None:
            nonlocal n_left
            n_left -= 1
            if keeps_files:
                worker.disk.add((context, number))
            if not n_left:
                build()

        def build() -> None:
            self.record.span(worker.name, STAGE, now, self.clock.now)
            self.later(worker, spec.load_s[life.device], lambda: finish(True))

        def finish(is_built: bool) -> None:
            began_s = worker.loads.pop(context)
            if is_built:
                ended_s = self.clock.now
                self.record.span(worker.name, LOAD, ended_s - spec.load_s[life.device], ended_s)
                self.record.loaded(worker.name, context, began_s, ended_s)
            else:
                self.record.load_failed(worker.name, began_s, self.clock.now)
            done(is_built)

        def arrive(number: int) -> None:
            unpack_s = spec.files[number].unpack_s[life.device]
            self.later(worker, unpack_s, lambda: unpacked(number))

        for number in lacking:
            name, n_bytes = f"{context}/{number}", spec.files[number].n_bytes
            self.staging.fetch(worker.name, name, n_bytes, functools.partial(arrive, number))
        if not lacking:
            build()

    def row_s(self, worker: Worker, run: RunSpec) -> float:
        """Seconds a row of a run takes there."""
        life = worker.life
        rows_s = sum(self.scenario.contexts[name].row_s[life.device] for name in run.contexts)
        return rows_s * life.slowness

    def infer_s(self, worker: Worker, run: RunSpec, n_rows: int) -> float:
        """Seconds that rows of a run take there, calls counted."""
        n_calls = math.ceil(n_rows / run.batch_rows)
        return n_rows * self.row_s(worker, run) + n_calls * self.scenario.overheads.call_s

    def rows_by(self, worker: Worker, run: RunSpec, n_rows: int, seconds: float) -> tuple[int, int]:
        """Of `n_rows`, those whose batches have ended after so many seconds; and those begun."""
        batch_s = self.infer_s(worker, run, run.batch_rows)
        n_ended = int(seconds / batch_s + 1e-9) * run.batch_rows
        n_begun = math.ceil(seconds / batch_s - 1e-9) * run.batch_rows
        return min(n_ended, n_rows), min(n_begun, n_rows)
