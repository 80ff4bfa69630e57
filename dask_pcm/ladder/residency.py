"""A context in this process: where it stands, who holds it, what it takes."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from dask_pcm.context.context import ContextRef
from dask_pcm.ladder.objects.live import Live
from dask_pcm.tiers import Tier


@dataclass(frozen=True, slots=True)
class Change:
    """A residency changed: what a worker reports to the scheduler.

    Attributes
    ----------
    seconds, is_built
        What it took to get on the device, and whether the loader was called for it.
    n_bytes
        What it takes there.
    staged_s
        Of these seconds, those in which its files came to this host.
    """

    digest: str
    tier: Tier
    seconds: float = 0.0
    error: str | None = None
    is_built: bool = False
    n_bytes: int = 0
    #: The kind of what went wrong: the error's type, or "device" where this process's device cannot
    #: be used at all; and whether the device is lost to this process.
    kind: str = ""
    is_sticky: bool = False
    staged_s: float = 0.0


@dataclass(slots=True)
class Residency:
    """A context in this process."""

    ref: ContextRef
    tier: Tier = Tier.ABSENT
    live: Live | None = None
    error: str | None = None
    n_loads: int = 0
    #: On the device, as far as it is known: declared, or measured when it was there.
    n_bytes: int = 0
    #: Whether the device has room for it, while it is on its way there.
    has_room: bool = False
    #: When somebody last held it, by the monotonic clock.
    used_at: float = 0.0
    n_holders: int = 0
    #: Threads that hold it, each as often as it does.
    threads: Counter[int] = field(default_factory=Counter)
    #: What its loader has acquired, and its object may be made of: held for as long as that is.
    inner: list[Residency] = field(default_factory=list)
    #: Until when a load that failed is better not tried again, by the monotonic clock.
    backoff_until: float = 0.0
    #: Whether it is to be dropped as soon as nobody holds it.
    is_released: bool = False
    #: The thread that loads it or, where it is exclusive, uses it; and how many times over.
    user: int | None = None
    n_uses: int = 0
    #: Keeps the staged files for as long as the live object may read them.
    files: ExitStack = field(default_factory=ExitStack)

    @property
    def value(self) -> Any:
        """The live object."""
        return None if self.live is None else self.live.value

    @property
    def holding(self) -> set[int]:
        """Threads without which it cannot leave the device."""
        return {*self.threads, *([] if self.user is None else [self.user])}

    @property
    def is_there(self) -> bool:
        """Whether it takes room on the device."""
        return self.tier is Tier.DEVICE or self.has_room
