"""The data of a scenario file: pools, contexts, runs, and what everything costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

#: Seconds by device model.
ByDevice: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class File:
    """A file of a context; unpacking takes `unpack_s` seconds between arrival and use."""

    n_bytes: int
    unpack_s: ByDevice


@dataclass(frozen=True, slots=True)
class ContextSpec:
    """A context and its costs.

    Attributes
    ----------
    files
        Files that a worker stages before it builds the context, in this order.
    load_s, row_s
        Seconds to build it, and seconds per row.
    restore_s
        Seconds to restore it from host memory.
    device_bytes
        Its size on a device.
    """

    name: str
    files: tuple[File, ...]
    load_s: ByDevice
    row_s: ByDevice
    restore_s: float
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Broken:
    """Broken workers, on which no context can be built.

    Attributes
    ----------
    n_workers
        Number of broken workers: the first of the pool.
    fails_after_s
        Seconds after which each load fails; None if loads hang.
    """

    n_workers: int
    fails_after_s: float | None


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers of one device model.

    Attributes
    ----------
    joins_s
        Join time of each worker; None if `joins_within_s` is given.
    joins_within_s
        Interval over which join times are drawn uniformly.
    row_spread
        Standard deviation of the logarithm of a worker's speed; speeds are lognormal.
    link_bytes_s
        (bytes per second in each direction, share of the workers) of each kind of link.
    life_s
        Mean of the exponential lifetime; None for no end.
    lost_s
        When the first worker of each place is lost, None for one that is not; or empty.
    walltime_s
        Upper limit of a lifetime; None for no limit.
    notice_s
        Seconds of notice before a worker's end; None for no notice.
    rejoins_after_s
        Seconds after a worker's end until another takes its place; None for no replacement.
    broken
        Broken workers of the pool; None without any.
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
    """A run: rows to be inferred.

    Attributes
    ----------
    batch_rows
        Rows per call of the model.
    task_rows
        Rows of a piece of the input, and of a baseline's task.
    priority
        User priority; higher goes first.
    starts_s
        Time at which it is submitted.
    is_run
        Whether it passes through a window; otherwise all its pieces are submitted at once.
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
    """Overheads of our system besides loading and inference, in seconds.

    Attributes
    ----------
    unit_s
        Reading and committing a unit; overlaps with the inference of another unit.
    call_s
        Per call of the model.
    message_s
        Latency of a message between scheduler and worker.
    decide_every_s
        Events within this time are decided on together, as in a busy scheduler.
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
    """Parameters of the baselines.

    Attributes
    ----------
    manager_bytes_s
        Bandwidth of the manager's link, which sends one file at a time.
    n_from_each
        Concurrent copies that a worker serves, at most.
    slow_share, slow_bytes_s
        Share of copies between workers that are limited to this bandwidth, even on idle links.
    task_s
        Seconds between two tasks on a worker.
    dispatches_per_s
        Tasks per second that the manager sends, at most.
    retry_s, n_retries
        Delay before a failed library restarts on its worker, and the number of restarts.
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
    """A complete scenario.

    Attributes
    ----------
    store_bytes_s
        Bandwidth of the shared store, in bytes per second.
    device_bytes
        Limit for contexts by device model; None for no limit.
    until_s
        Time at which the simulation stops, finished or not.
    sweep_task_rows
        Task sizes of a sweep: the scenario is simulated once for each.
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
        """Rows of all runs."""
        return sum(run.n_rows for run in self.runs)

    def effective_row_s(self, run: RunSpec, device: str) -> float:
        """Seconds per row of a run on a device model, summed over its contexts, with calls."""
        rows = sum(self.contexts[context].row_s[device] for context in run.contexts)
        return rows + self.overheads.call_s / run.batch_rows
