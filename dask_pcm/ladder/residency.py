"""A residency is a context in this process: its tier, its holders and its bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dask_pcm.context.context import ContextRef
from dask_pcm.ladder.objects.live import Live
from dask_pcm.tiers import Tier

#: The back-off after a failed load, as a multiple of the seconds that the load took.
_BACKOFF_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a residency, as a worker reports it to the scheduler.

    Attributes
    ----------
    seconds, is_built
        How long it took to bring the context to the device, and whether its loader was called.
    n_bytes
        What the context takes on the device.
    staged_s
        The part of `seconds` that staging its files took.
    n_rows
        Rows in flight that its attendant serves at most; 0 if it has none.
    kind
        The type of the error; "device" if this process cannot use its device at all.
    is_sticky
        Whether the error has made the device unusable for this process.
    """

    digest: str
    tier: Tier
    seconds: float = 0.0
    error: str | None = None
    is_built: bool = False
    n_bytes: int = 0
    kind: str = ""
    is_sticky: bool = False
    staged_s: float = 0.0
    n_rows: int = 0


class Attendant(Protocol):
    """Serves a live object and is not part of it: an engine's thread and pool of pages.

    A live object that has one says ``is_attended = True`` and has a method ``attend``, which makes
    it. The ladder calls that each time that the object has come to the device, and closes the
    attendant before the object leaves. So an attendant is never pickled, and no image on the host
    tier has it. Its context is one with ``exclusive=False``: many tasks hold it at the same time.

    Attributes
    ----------
    n_bytes
        What it takes on the device beside the object, from ``start`` on; reserved before that.
    n_rows
        Rows in flight that it takes at most.
    host_bytes
        What it may take of the host's memory, as it needs it; 0 if it has no such attribute.
    """

    n_bytes: int
    n_rows: int

    def start(self) -> None:
        """Take the memory and begin to serve."""

    def submit(self, request: Any) -> Future[Any]:
        """Begin to serve a request; may block while there is no room for more.

        A future that is cancelled is served no further.
        """

    def hungry(self) -> int:
        """How many more rows it could serve at once, now."""

    def alone(self) -> AbstractContextManager[None]:
        """Within the block it serves requests of this thread only."""

    def drain(self) -> None:
        """Finish what is in flight, and accept nothing more."""

    def close(self) -> None:
        """Stop at once, free the memory and let go of the live object; requests in flight fail."""


@runtime_checkable
class Drafting(Protocol):
    """An attendant whose requests take long, and leave drafts of what is not finished.

    A draft is what a row has so far, as numbers under a key that names the row: texts that are
    generated have their tokens. Another process goes on from there.
    """

    def wait_for_room(self, timeout_s: float | None) -> bool:
        """Wait until the next request of this thread is accepted at once; False if it took longer.

        Without it, ``submit`` waits.
        """

    def drafts(self) -> dict[int, list[int]]:
        """Drafts of the rows of requests that this thread has submitted and that have not ended."""

    def resume(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Let rows that this thread submits from now on go on from drafts, if there are any."""


class Lent(Protocol):
    """Memory that is lent to an attendant.

    Attributes
    ----------
    is_wanted_back
        Whether the attendant has to copy what is there, and close it.
    """

    is_wanted_back: bool

    def memory(self) -> Any:
        """Its bytes as a tensor, uint8."""

    def on_wanted(self, call: Callable[[], None]) -> None:
        """Have something called, on any thread, once the memory is wanted back."""

    def close(self) -> None:
        """Return the memory, which is not used any more."""


@runtime_checkable
class Borrowing(Protocol):
    """An attendant that can use memory beside its own, as long as the lender does without it."""

    def lend(self, borrow: Callable[[str, int], Lent | None]) -> None:
        """Where it borrows: memory of a "device" or of the "host", in bytes; called before start.

        None is returned if there is nothing to be had.
        """

    def n_waiting(self) -> int:
        """How many rows wait since they have no memory."""

    def needed_bytes(self) -> int:
        """What rows take beside the memory that it has on the device."""


@runtime_checkable
class Stopping(Protocol):
    """An attendant that may stop by an error, and serves nothing from then on."""

    def on_stopped(self, call: Callable[[], None]) -> None:
        """Have something called then, on any thread."""


@dataclass(slots=True)
class Residency:
    """A context in this process; the store's lock guards every field."""

    ref: ContextRef
    tier: Tier = Tier.ABSENT
    live: Live | None = None
    #: Serves the live object while it is on the device, if the object has one.
    attendant: Attendant | None = None
    error: str | None = None
    n_loads: int = 0
    #: What it takes on the device: declared, or measured once it has been there.
    n_bytes: int = 0
    #: What its attendant takes there now, and what it takes whenever it serves.
    attendant_bytes: int = 0
    attendant_size: int = 0
    #: Whether room on the device is reserved for it while it moves.
    has_room: bool = False
    #: Whether it is on its way to the device and waits for room there; and whether it leaves memory
    #: that was lent for it meanwhile.
    waits_for_room: bool = False
    is_relocated: bool = False
    #: When it was last held, by the monotonic clock.
    used_at: float = 0.0
    n_holders: int = 0
    #: Threads that hold it, with the number of their holds.
    threads: Counter[int] = field(default_factory=Counter)
    #: Contexts that its loader acquired: its object may refer to theirs, so they are held as long
    #: as it exists.
    inner: list[Residency] = field(default_factory=list)
    #: When the back-off after a failed load ends, by the monotonic clock.
    backoff_until: float = 0.0
    #: Whether it is evicted as soon as no task holds it.
    is_released: bool = False
    #: The thread that moves it or, if it is exclusive, has its turn; and how often it has entered.
    user: int | None = None
    n_uses: int = 0
    #: When the turn began, by the monotonic clock.
    turn_began: float = 0.0
    #: Keeps the staged files on disk as long as the live object may read them.
    files: ExitStack = field(default_factory=ExitStack)

    @property
    def value(self) -> Any:
        """The live object; None while there is none."""
        return None if self.live is None else self.live.value

    @property
    def taken_bytes(self) -> int:
        """What it takes on the device with its attendant."""
        return self.n_bytes + self.attendant_bytes

    @property
    def full_bytes(self) -> int:
        """What it takes on the device whenever it is there; reported to the gate."""
        return self.n_bytes + self.attendant_size

    @property
    def holding(self) -> set[int]:
        """Threads that keep it on the device."""
        return {*self.threads, *([] if self.user is None else [self.user])}

    @property
    def is_there(self) -> bool:
        """Whether its bytes count against the device budget."""
        return self.tier is Tier.DEVICE or self.has_room

    @property
    def is_backing_off(self) -> bool:
        """Whether the last load failed and its back-off has not ended."""
        return self.tier is Tier.FAILED and time.monotonic() < self.backoff_until

    def end_load(self, error: str | None, is_built: bool, seconds: float) -> None:
        """Record how a load has ended; with the store's lock held."""
        self.tier, self.user = Tier.FAILED if error else Tier.DEVICE, None
        self.error, self.has_room = error, False
        self.n_loads += is_built and not error
        self.used_at = time.monotonic()
        self.backoff_until = time.monotonic() + _BACKOFF_FACTOR * seconds

    def validate(self) -> None:
        """Raise AssertionError if the fields contradict each other; with the store's lock held."""
        digest = self.ref.digest
        assert self.n_holders >= 0, digest
        assert (self.tier is Tier.FAILED) == (self.error is not None), digest
        # What is held is never offloaded or evicted.
        assert not self.n_holders or self.tier is Tier.DEVICE, digest
        assert self.live is not None or self.tier not in (Tier.DEVICE, Tier.HOST), digest
        assert self.attendant is None or self.tier in (Tier.DEVICE, Tier.LOADING), digest
