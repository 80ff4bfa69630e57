"""A world to be simulated, as a scenario file describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

#: Seconds by device model.
ByDevice: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class File:
    """A file of a context; `unpack_s` pass on a worker between its arrival and its use."""

    n_bytes: int
    unpack_s: ByDevice


@dataclass(frozen=True, slots=True)
class ContextSpec:
    """What a context takes.

    Attributes
    ----------
    files
        What must be on a worker's disk before it is built, in this order.
    load_s, row_s
        Seconds to build it, and to infer a row with it.
    restore_s
        Seconds to bring it back from the rung below the device.
    device_bytes
        What it takes on a device.
    """

    name: str
    files: tuple[File, ...]
    load_s: ByDevice
    row_s: ByDevice
    restore_s: float
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Broken:
    """Workers on which nothing can be built.

    Attributes
    ----------
    n_workers
        The first so many of the pool.
    fails_after_s
        Seconds after which each load fails there; None where it neither fails nor ends.
    """

    n_workers: int
    fails_after_s: float | None


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers of one device model.

    Attributes
    ----------
    joins_s
        When each joins: as many as there are workers.
    joins_within_s
        Joins are spread over this interval at random instead.
    row_spread
        Standard deviation of a worker's speed, over its device's; speeds are lognormal.
    link_bytes_s
        Bandwidths of workers' links (bytes a second, each way), and which share of workers has
        each.
    life_s
        Mean of an exponential life; None for ever.
    lost_s
        When the first worker of each place is lost: as many as there are places, None for whoever
        is not; or none at all.
    walltime_s
        No worker lives longer.
    notice_s
        So long before its end a worker is told of it; None where nobody is.
    rejoins_after_s
        So long after a worker's end another takes its place; None where none does.
    """

    name: str
    device: str
    n_workers: int
    joins_s: tuple[float, ...] | None
    joins_within_s: tuple[float, float] | None
    row_spread: float
    link_bytes_s: tuple[tuple[float, float], ...]
    life_s: float | None
    lost_s: tuple[float | None, ...]
    walltime_s: float | None
    notice_s: float | None
    rejoins_after_s: float | None
    broken: Broken | None


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Rows to be inferred.

    Attributes
    ----------
    batch_rows
        Rows of one call of the model.
    task_rows
        Rows of a piece of the input, and so of a baseline's task.
    is_run
        Whether it is fed through a window; otherwise all its pieces are tasks at once.
    """

    name: str
    n_rows: int
    contexts: tuple[str, ...]
    batch_rows: int
    task_rows: int
    priority: float
    starts_s: float
    is_run: bool


@dataclass(frozen=True, slots=True)
class Overheads:
    """What we spend besides loading and inferring.

    Attributes
    ----------
    unit_s
        Reading and committing a unit: hidden behind another's inference where there is one.
    call_s
        Each call of the model.
    message_s
        A message's way between scheduler and worker.
    decide_every_s
        What happens within this time is decided on at once, as in a busy scheduler.
    is_journalled
        Whether finished batches of a unit survive the loss of its worker.
    """

    unit_s: float
    call_s: float
    message_s: float
    decide_every_s: float
    is_journalled: bool


@dataclass(frozen=True, slots=True)
class Baselines:
    """How the systems of the papers behave.

    Attributes
    ----------
    manager_bytes_s
        Bandwidth of the manager's link; it sends one file after another.
    n_from_each
        Copies that a worker serves at a time.
    slow_share, slow_bytes_s
        Share of copies from worker to worker that are no faster than that, however idle both ends.
    task_s
        Between two tasks on a worker.
    dispatches_per_s
        Tasks that the manager sends out at most.
    retry_s, n_retries
        A library that failed on a worker is started there again after so long, so many times.
    """

    manager_bytes_s: float
    n_from_each: int
    slow_share: float
    slow_bytes_s: float
    task_s: float
    dispatches_per_s: float
    retry_s: float
    n_retries: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """Pools, contexts, what is to be done, and what everything takes.

    Attributes
    ----------
    store_bytes_s
        Bandwidth of the shared store.
    device_bytes
        Memory for contexts by device model; a model that is not there has no limit.
    until_s
        The simulation ends here, done or not.
    sweep_task_rows
        Sizes of tasks with which the scenario is simulated one after another.
    """

    name: str
    title: str
    store_bytes_s: float
    device_bytes: Mapping[str, int | None]
    contexts: Mapping[str, ContextSpec]
    pools: tuple[Pool, ...]
    runs: tuple[RunSpec, ...]
    overheads: Overheads
    baselines: Baselines
    until_s: float
    sweep_task_rows: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        return sum(run.n_rows for run in self.runs)

    def effective_row_s(self, run: RunSpec, device: str) -> float:
        """Seconds a row of a run on a device, calls counted; contexts of a run add up."""
        rows = sum(self.contexts[context].row_s[device] for context in run.contexts)
        return rows + self.overheads.call_s / run.batch_rows
