"""What happened, and what to do about it: the words between the gate's policy and its drivers.

The scheduler plugin and the simulator turn their worlds into these events, hand them to
``GateState.apply`` and carry out the actions that ``policy.decide`` returns.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

from dask_pcm.tiers import Tier


@dataclass(frozen=True, slots=True)
class Group:
    """Work that is alike to the policy.

    Attributes
    ----------
    contexts
        Digests that a worker must hold.
    kind
        What costs alike: the task's key prefix.
    allowed
        Workers that the user's restrictions leave; None for all.
    client
        Who has asked for it: clients share what there is.
    is_isolated
        Whether each piece needs a worker for itself: it was there when processes ended, and the
        next one that ends is to show whether it was to blame.
    """

    contexts: tuple[str, ...]
    kind: str
    allowed: frozenset[str] | None = None
    client: str = ""
    is_isolated: bool = False

    @property
    def costs(self) -> tuple[tuple[str, ...], str]:
        """What its costs are known by."""
        return self.contexts, self.kind


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work, dispatched as a whole; lower `priority` goes first.

    Attributes
    ----------
    cut_for
        The device model for which its size was chosen; empty for any.
    is_again
        Whether it was begun before: some of it may be done, and it tells nothing of costs.
    """

    key: object
    group: Group
    priority: tuple[float, ...]
    n_rows: float = 1.0
    cut_for: str = ""
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is there.

    Attributes
    ----------
    device_bytes
        What contexts may take on its device; None if that is not known, or has no limit.
    host
        The machine that it is on.
    device
        The model of its device.
    pool
        Workers of which it is one, and which live as long as each other.
    ends_in_s
        Seconds that the batch system leaves it; infinity if that is not known.
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
    """A worker is gone.

    Attributes
    ----------
    is_lost
        Whether nobody had asked it to go.
    """

    worker: str
    is_lost: bool = True


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker has been told that it will end in so many seconds."""

    worker: str
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerPaused:
    worker: str
    is_paused: bool


@dataclass(frozen=True, slots=True)
class WorkParked:
    """Work is ready to run, and waits."""

    work: Work


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """Work left its worker: finished, failed, or to be parked again."""

    key: object
    is_finished: bool


@dataclass(frozen=True, slots=True)
class WorkWithdrawn:
    """Nobody wants this work any more."""

    key: object


@dataclass(frozen=True, slots=True)
class ResidencyReported:
    """A context moved on a worker, or could not be moved.

    Attributes
    ----------
    tier
        Where it is now.
    seconds, is_built
        What it took to warm it, and whether it was built for it or only restored.
    staged_s
        Of these, the seconds in which files came to its host.
    n_bytes
        What it takes on the device; 0 if that is not known.
    device_bytes
        What contexts may take there; None if that is not known, or has no limit.
    kind
        Of the error: what fails the same way has the same.
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


@dataclass(frozen=True, slots=True)
class ContextDeclared:
    """Somebody wants a context.

    Attributes
    ----------
    n_bytes
        What it is said to take on a device.
    file_bytes
        What has to be on a worker's disk before it is built.
    """

    context: str
    name: str
    n_bytes: int | None = None
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Restarted:
    """Somebody has all workers begin anew: what ends now ends for that, and nothing has failed."""


@dataclass(frozen=True, slots=True)
class RunReported:
    """A run has `n_rows` more to submit in this group, `n_units` at most at a time apart."""

    run: str
    group: Group
    n_rows: float
    n_units: int


@dataclass(frozen=True, slots=True)
class RunClosed:
    run: str


Event: TypeAlias = (
    WorkerJoined
    | WorkerLeft
    | WorkerPaused
    | WorkerDraining
    | WorkParked
    | WorkEnded
    | WorkWithdrawn
    | ResidencyReported
    | ContextDeclared
    | Restarted
    | RunReported
    | RunClosed
)


@dataclass(frozen=True, slots=True)
class Assign:
    """Send this work to this worker."""

    key: object
    worker: str


@dataclass(frozen=True, slots=True)
class Load:
    """Have this worker load this context."""

    worker: str
    context: str


@dataclass(frozen=True, slots=True)
class Offload:
    """Have a context on this worker leave the device, for the rung below."""

    worker: str
    context: str


@dataclass(frozen=True, slots=True)
class Vacate:
    """Nothing to do, but to know: no more work that needs this context is sent to this worker.

    As soon as what is there has ended, it makes room for `group`.
    """

    worker: str
    context: str
    group: Group


@dataclass(frozen=True, slots=True)
class Fail:
    """End this work: its context cannot be loaded."""

    key: object
    context: str
    error: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Nothing to do, but to know: a node is left alone for so many seconds."""

    host: str
    seconds: float
    error: str


@dataclass(frozen=True, slots=True)
class LoadsGivenUp:
    """Nothing to do, but to know: this context is not loaded again until somebody asks anew."""

    context: str


Action: TypeAlias = Assign | Load | Offload | Vacate | Fail | Quarantine | LoadsGivenUp
