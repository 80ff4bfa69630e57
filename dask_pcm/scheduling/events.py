"""Events in, actions out: what the gate's policy is told; what it decides is in ``actions``.

A driver (the scheduler plugin or the simulator) reports events to ``GateState.apply`` and carries
out the actions that ``policy.decide`` returns. Sizes are in bytes, durations in seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

from dask_pcm.tiers import Tier


@dataclass(frozen=True, slots=True)
class Group:
    """Work that the policy treats alike.

    Attributes
    ----------
    contexts
        Digests of the contexts that a worker must hold.
    kind
        The task's key prefix; work of the same kind costs alike.
    allowed
        Workers left by the user's restrictions; None for all.
    client
        The client that submitted it; clients share the workers fairly.
    is_isolated
        Whether each piece must run alone on its worker. Such work was running when a worker
        process died; alone, the next death can be attributed to it.
    """

    contexts: tuple[str, ...]
    kind: str
    allowed: frozenset[str] | None = None
    client: str = ""
    is_isolated: bool = False

    @property
    def costs(self) -> tuple[tuple[str, ...], str]:
        """Key of the group's learned costs."""
        return self.contexts, self.kind


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work, dispatched as a whole; lower `priority` goes first.

    Attributes
    ----------
    cut_for
        Device model that its size was chosen for; empty for any.
    is_again
        Whether it is a retry. Part of it may be done already, so it teaches no costs.
    """

    key: object
    group: Group
    priority: tuple[float, ...]
    n_rows: float = 1.0
    cut_for: str = ""
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker has joined.

    Attributes
    ----------
    device_bytes
        Limit for contexts on its device; None if unknown or unlimited.
    host
        Its node.
    device
        Its device model.
    pool
        Its pool; workers of a pool share a hazard rate. Empty for the device model.
    ends_in_s
        Seconds until the batch system ends it; infinity if unknown.
    """

    worker: str
    n_lanes: int
    device_bytes: int | None = None
    host: str = ""
    device: str = ""
    pool: str = ""
    ends_in_s: float = math.inf


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """A worker has left.

    Attributes
    ----------
    is_lost
        Whether it left without a request.
    """

    worker: str
    is_lost: bool = True


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker has had notice that it will end in `seconds` seconds.

    Attributes
    ----------
    is_preempted
        Whether it is taken away; otherwise its cluster gives it back.
    """

    worker: str
    seconds: float
    is_preempted: bool = True


@dataclass(frozen=True, slots=True)
class WorkerPaused:
    """Dask has paused a worker, or resumed it; a worker that is closing counts as paused."""

    worker: str
    is_paused: bool


@dataclass(frozen=True, slots=True)
class WorkParked:
    """Work is ready to run and waits at the gate; parked again, it replaces the earlier work."""

    work: Work


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """Work has left its worker: finished, failed, or about to be parked again."""

    key: object
    is_finished: bool


@dataclass(frozen=True, slots=True)
class WorkHandedOver:
    """Work has left its lane and goes on: its lane is free, and its worker still answers for it.

    Attributes
    ----------
    n_rows
        Its rows that are still in flight in what serves many at a time. None if it waits for other
        work: it has seceded.
    """

    key: object
    n_rows: float | None = None


@dataclass(frozen=True, slots=True)
class WorkRejoined:
    """Work that had seceded is on a lane again."""

    key: object


@dataclass(frozen=True, slots=True)
class WorkWithdrawn:
    """Work was cancelled: its result is no longer needed."""

    key: object


@dataclass(frozen=True, slots=True)
class ResidencyReported:
    """A context has moved to another tier on a worker, or has failed to.

    Attributes
    ----------
    tier
        Where it is now.
    seconds
        Seconds that warming it took.
    error
        Why it failed; None otherwise.
    is_built
        Whether it was built rather than restored.
    n_bytes
        Its size on the device; 0 if unknown.
    device_bytes
        Limit for contexts on the worker's device; None if unknown or unlimited.
    kind
        Kind of the error; errors of the same kind have the same cause.
    staged_s
        Seconds of `seconds` spent on staging files.
    n_rows
        Rows in flight that its attendant serves at most; 0 if there is none.
    """

    worker: str
    context: str
    tier: Tier
    _: KW_ONLY
    seconds: float = 0.0
    error: str | None = None
    is_built: bool = True
    n_bytes: int = 0
    device_bytes: int | None = None
    kind: str = ""
    staged_s: float = 0.0
    n_rows: int = 0


@dataclass(frozen=True, slots=True)
class ContextDeclared:
    """A client has announced a context.

    Attributes
    ----------
    n_bytes
        Declared size on a device; None if not declared.
    file_bytes
        Size of the files that must be staged before it is built.
    """

    context: str
    name: str
    n_bytes: int | None = None
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Restarted:
    """All workers are being restarted on request: loads that end now do not count as failures."""


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A worker's process has ended by itself while it loaded contexts, and was started again.

    Attributes
    ----------
    worker
        The worker that has taken its place, on node `host`.
    contexts
        What was loading: each load may be the cause.
    """

    worker: str
    host: str
    contexts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunReported:
    """A run will submit `n_rows` more rows to a group, in at most `n_units` units at a time."""

    run: str
    group: Group
    n_rows: float
    n_units: int


@dataclass(frozen=True, slots=True)
class RunClosed:
    """A run has ended, and submits nothing more."""

    run: str


@dataclass(frozen=True, slots=True)
class PoolsDeclared:
    """A cluster has announced the pools whose jobs it may submit.

    Attributes
    ----------
    device_bytes
        By pool, what contexts may take on the devices of one of its workers; None if not known.
    """

    device_bytes: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class QuestionPlaced:
    """A question to a context was sent to a worker, which answers it beside its work."""

    worker: str
    context: str


@dataclass(frozen=True, slots=True)
class QuestionEnded:
    """A worker answers a question no longer."""

    worker: str
    context: str


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Copies of contexts on hosts.

    Attributes
    ----------
    hosts
        By host, how many copies of each context.
    most_bytes
        The largest balance of a host.
    most_surplus
        The largest number of lenders without a borrower on a host.
    n_alone
        Borrowers for which their host has no lender.
    gap
        How far the plan may be from the best one, as a share of its cost; 0 for the best one.
    """

    hosts: Mapping[str, Counter[str]]
    most_bytes: int
    most_surplus: int
    n_alone: int
    gap: float

    def n_on(self, host: str, name: str) -> int:
        """Copies of a context that should be on a host."""
        planned = self.hosts.get(host)
        return 0 if planned is None else planned[name]


@dataclass(frozen=True, slots=True)
class MemoryNeeded:
    """A context needs more memory than its device has: rows of its engine have made room.

    Attributes
    ----------
    n_bytes
        What they take elsewhere, on one worker.
    """

    context: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class HostsPlanned:
    """The placer has made a plan of which contexts go on which hosts; None if none is needed."""

    plan: HostPlan | None


Event: TypeAlias = (
    WorkerJoined
    | WorkerLeft
    | WorkerPaused
    | WorkerDraining
    | WorkParked
    | WorkEnded
    | WorkHandedOver
    | WorkRejoined
    | WorkWithdrawn
    | ResidencyReported
    | ContextDeclared
    | Restarted
    | ProcessEnded
    | RunReported
    | RunClosed
    | PoolsDeclared
    | QuestionPlaced
    | QuestionEnded
    | MemoryNeeded
    | HostsPlanned
)
