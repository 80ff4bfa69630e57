"""What is resident in this process: one load for each digest, acquire and release.

The store knows nothing of Dask. Threads of any kind may call it.
"""

from __future__ import annotations

import enum
import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from dask_pcm.context import ContextRef, Recipe, Sealed
from dask_pcm.errors import DeadlockError, LoadError
from dask_pcm.ladder.staging import Staging

logger = logging.getLogger(__name__)

#: A load that failed is not tried again for so many times the seconds that it took.
_REST = 10.0


class Tier(enum.Enum):
    """Where a context stands."""

    ABSENT = "absent"
    LOADING = "loading"
    DEVICE = "device"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Change:
    """A residency changed: what a worker reports to the scheduler."""

    digest: str
    tier: Tier
    seconds: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class Residency:
    """A context in this process."""

    ref: ContextRef
    tier: Tier = Tier.ABSENT
    value: Any = None
    error: str | None = None
    n_loads: int = 0
    n_holders: int = 0
    #: Until when a load that failed is better not tried again, by the monotonic clock.
    rests_until: float = 0.0
    #: Whether it is to be dropped as soon as nobody holds it.
    is_released: bool = False
    #: The thread that loads it or, where it is exclusive, uses it; and how many times over.
    user: int | None = None
    n_uses: int = 0
    #: Keeps the staged files for as long as the live object may read them.
    files: ExitStack = field(default_factory=ExitStack)


class Store:
    """Contexts of this process by digest.

    Parameters
    ----------
    on_change
        Called after every change, from the thread that made it and without the store's lock.
    staging
        What brings files of recipes to this host.
    """

    def __init__(
        self,
        on_change: Callable[[Change], None] | None = None,
        staging: Staging | None = None,
    ) -> None:
        self._on_change = on_change or (lambda change: None)
        self._staging = staging or Staging()
        self._residencies: dict[str, Residency] = {}
        #: What each thread that waits for its turn waits for.
        self._awaited: dict[int, Residency] = {}
        self._is_closed = False
        # Guards every field of every residency; notified when a load or a turn ends.
        self._changed = threading.Condition()

    def tier(self, digest: str) -> Tier:
        """Where the context stands now."""
        with self._changed:
            residency = self._residencies.get(digest)
            return residency.tier if residency else Tier.ABSENT

    def n_loads(self, digest: str) -> int:
        """How often the context was built in this process."""
        with self._changed:
            residency = self._residencies.get(digest)
            return residency.n_loads if residency else 0

    def rests(self, digest: str) -> bool:
        """Whether the context failed to load so lately that trying again would not be worth it.

        It rests ten times as long as the load took, so that what cannot be loaded costs little.
        """
        with self._changed:
            residency = self._residencies.get(digest)
            if residency is None or residency.tier is not Tier.FAILED:
                return False
            return time.monotonic() < residency.rests_until

    def load(self, ref: ContextRef, again: bool = True) -> Any:
        """Build the context unless it is here, and return the live object.

        Whoever comes while another thread builds waits for that one build. After a failure the
        next call tries again, or raises the same error if `again` is False.

        Raises
        ------
        LoadError
            With the loader's traceback in its message.
        """
        with self._changed:
            residency = self._residencies.setdefault(ref.digest, Residency(ref))
            waited = residency.tier is Tier.LOADING
            self._await(residency, lambda: residency.tier is not Tier.LOADING)
            if residency.tier is Tier.DEVICE:
                return residency.value
            if residency.tier is Tier.FAILED and (waited or not again):
                raise LoadError(residency.error)
            residency.tier, residency.user = Tier.LOADING, threading.get_ident()
            residency.ref = ref  # the same recipe, but perhaps pickled so that it can be opened
        self._on_change(Change(ref.digest, Tier.LOADING))
        return self._build(residency)

    def _build(self, residency: Residency) -> Any:
        ref, start = residency.ref, time.monotonic()
        value, error = None, None
        try:
            recipe: Recipe = Sealed(ref.digest, ref.recipe).open()
            value = recipe.build(residency.files.enter_context(self._staging.placed(ref.bundles)))
        except BaseException as cause:  # also SystemExit: a library that exits is a failed load
            error = _explain(ref, cause)
            logger.warning("%s", error)
            residency.files.close()
        seconds = time.monotonic() - start
        with self._changed:
            residency.tier, residency.user = Tier.FAILED if error else Tier.DEVICE, None
            residency.value, residency.error = value, error
            residency.n_loads += not error
            residency.rests_until = time.monotonic() + _REST * seconds
            self._changed.notify_all()
        self._on_change(Change(ref.digest, residency.tier, seconds, error))
        if error:
            raise LoadError(error)
        return value

    @contextmanager
    def acquire(self, refs: Sequence[ContextRef], again: bool = True) -> Iterator[list[Any]]:
        """Hold the live objects of `refs`, in their order; build what is missing.

        What failed to load before is tried again, or raises the same error if `again` is False.

        An exclusive context has one holder at a time. Several are taken in the order of their
        digests, so that two tasks never wait for each other. What a task raises while it holds
        a context says nothing about the context: it stays.

        Raises
        ------
        LoadError
            Where one cannot be built.
        DeadlockError
            Where the thread holds an exclusive context already, and whoever holds this one waits
            for that.
        """
        with ExitStack() as stack:
            held = {}
            for ref in sorted(refs, key=lambda ref: ref.digest):
                if ref.digest not in held:
                    held[ref.digest] = stack.enter_context(self._hold(ref, again))
            yield [held[ref.digest] for ref in refs]

    @contextmanager
    def _hold(self, ref: ContextRef, again: bool) -> Iterator[Any]:
        while True:
            value = self.load(ref, again)
            with self._changed:
                residency = self._residencies.get(ref.digest)
                # Between load() and here another thread may have evicted it: build it again.
                if residency and residency.tier is Tier.DEVICE and residency.value is value:
                    residency.n_holders += 1
                    break
        try:
            with self._turn(residency) if ref.is_exclusive else nullcontext():
                yield value
        finally:
            with self._changed:
                residency.n_holders -= 1
                is_unwanted = self._is_closed or residency.is_released
                is_left = is_unwanted and not residency.n_holders
            if is_left:
                self.evict(ref.digest)

    @contextmanager
    def _turn(self, residency: Residency) -> Iterator[None]:
        """Be the only thread that uses a context; the same thread may take it again."""
        me = threading.get_ident()
        with self._changed:
            if residency.user != me:
                self._await(residency, lambda: residency.user is None)
            residency.user = me
            residency.n_uses += 1
        try:
            yield
        finally:
            with self._changed:
                residency.n_uses -= 1
                if not residency.n_uses:
                    residency.user = None
                    self._changed.notify_all()

    def _await(self, residency: Residency, is_so: Callable[[], bool]) -> None:
        """Wait for whoever loads or uses a context; with the store's lock."""
        if is_so():
            return
        me = threading.get_ident()
        self._refuse_deadlock(residency, me)
        self._awaited[me] = residency
        try:
            self._changed.wait_for(is_so)
        finally:
            del self._awaited[me]

    def _refuse_deadlock(self, wanted: Residency, me: int) -> None:
        """Follow who waits for what: if that leads back here, nobody would ever go on."""
        if wanted.user == me:
            raise DeadlockError(
                f"The loader of context {wanted.ref.name!r} asks for that context itself."
            )
        residency: Residency | None = wanted
        while residency is not None and residency.user is not None:
            residency = self._awaited.get(residency.user)
            if residency is not None and residency.user == me:
                raise DeadlockError(
                    f"Context {residency.ref.name!r} is held or loaded here, and"
                    f" {wanted.ref.name!r} is wanted; whoever holds or loads that, on this worker,"
                    " waits for what is held here. Take both at once, in every task:"
                    " with pcm.acquire(first, second) as (one, other)."
                )

    def evict(self, digest: str) -> bool:
        """Drop a context that nobody holds; False if it is held or not here."""
        with self._changed:
            residency = self._residencies.get(digest)
            if residency is None or residency.n_holders or residency.tier is Tier.LOADING:
                return False
            del self._residencies[digest]
        with residency.files:
            _close(residency)
        self._on_change(Change(digest, Tier.ABSENT))
        return True

    def release(self, digest: str) -> None:
        """Drop a context, as soon as nobody holds it."""
        with self._changed:
            if (residency := self._residencies.get(digest)) is not None:
                residency.is_released = True
        self.evict(digest)

    def close(self) -> None:
        """Drop everything for good; what is held as soon as it is not."""
        self._is_closed = True
        self.clear()

    def clear(self) -> None:
        """Drop whatever nobody holds."""
        with self._changed:
            digests = list(self._residencies)
        for digest in digests:
            self.evict(digest)

    def validate(self) -> None:
        """Raise AssertionError where the state contradicts itself."""
        with self._changed:
            for digest, residency in self._residencies.items():
                assert residency.ref.digest == digest
                assert residency.n_holders >= 0, digest
                assert (residency.tier is Tier.FAILED) == (residency.error is not None), digest
                assert not residency.n_holders or residency.tier is Tier.DEVICE, digest
                assert residency.tier is Tier.DEVICE or residency.value is None, digest


@functools.cache
def of_process() -> Store:
    """The store of tasks that no worker plugin cares for."""
    return Store()


def _explain(ref: ContextRef, cause: BaseException) -> str:
    text = "".join(traceback.format_exception(cause)).rstrip()
    return f"Context {ref.name!r} could not be loaded:\n\n{text}"


def _close(residency: Residency) -> None:
    if residency.tier is not Tier.DEVICE:
        return
    close = Sealed(residency.ref.digest, residency.ref.recipe).open().close
    if close is None:
        return
    try:
        close(residency.value)
    except Exception:
        logger.warning("close hook of context %r failed", residency.ref.name, exc_info=True)
