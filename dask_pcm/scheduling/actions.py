"""What the gate's policy decides; what it decides from is in ``events``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dask_pcm.scheduling.events import Group


@dataclass(frozen=True, slots=True)
class Assign:
    """Send work to a worker."""

    key: object
    worker: str


@dataclass(frozen=True, slots=True)
class Load:
    """Have a worker load a context."""

    worker: str
    context: str


@dataclass(frozen=True, slots=True)
class Offload:
    """Have a worker move a context from the device to host memory."""

    worker: str
    context: str


@dataclass(frozen=True, slots=True)
class Vacate:
    """Informational; no side effect: a worker gets no more work that needs a context.

    Once its assigned work has ended, the context is evicted for `group`.
    """

    worker: str
    context: str
    group: Group


@dataclass(frozen=True, slots=True)
class Fail:
    """Fail work: its context cannot be loaded."""

    key: object
    context: str
    error: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Informational; no side effect: a node is quarantined for `seconds` seconds."""

    host: str
    seconds: float
    error: str


@dataclass(frozen=True, slots=True)
class LoadsGivenUp:
    """Informational; no side effect: a context is not loaded again until it is requested anew."""

    context: str


Action: TypeAlias = Assign | Load | Offload | Vacate | Fail | Quarantine | LoadsGivenUp
