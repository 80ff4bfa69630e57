"""The contexts of this process: each is built once, then shared by every task that acquires it.

The store does not depend on Dask. Every public method may be called from any thread.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import LoadError
from dask_pcm.ladder.budget import DeviceBudget
from dask_pcm.ladder.build import Builder
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.lending import Leases, Lending
from dask_pcm.ladder.lending.tier import LentTier
from dask_pcm.ladder.loads import Loads
from dask_pcm.ladder.objects.host import ContextImages, Host
from dask_pcm.ladder.objects.live import LowerTier
from dask_pcm.ladder.residencies import Residencies
from dask_pcm.ladder.residency import Attendant, Borrowing, Change, Residency
from dask_pcm.ladder.turns import Turns
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)


class Store:
    """Loads, holds, offloads and evicts contexts, by digest.

    Parameters
    ----------
    on_change
        Called after every change, from the thread that made it and without the store's lock.
    staging
        Stages the files of recipes on this host's disk.
    host
        The host tier; by default one that ends with this process.
    budget
        Returns what contexts may take on the device, in bytes; None for no limit.
    is_mapped, is_cpu_only
        See ``Builder``.

    Attributes
    ----------
    device
        The budget of the device, which other tenants may share.
    """

    def __init__(
        self,
        on_change: Callable[[Change], None] | None = None,
        staging: Staging | None = None,
        host: Host | None = None,
        budget: Callable[[], int | None] = lambda: None,
        is_mapped: bool = True,
        is_cpu_only: bool = False,
    ) -> None:
        host = host or Host()
        self._residencies = Residencies(on_change or (lambda change: None), host)
        self.turns = Turns(self._residencies.changed)
        self.device = DeviceBudget(budget, self._residencies.changed, self.turns)
        self.device.add(self._residencies)
        builder = Builder(staging or Staging(), host, is_mapped, is_cpu_only)
        self._loads = Loads(self._residencies, self.device, builder)
        self._host, self._builder = host, builder
        #: Memory that is lent and borrowed, if ``lend`` was called.
        self.lending: Lending | None = None

    def lend(
        self,
        device: Callable[[], str | None] = lambda: None,
        devices: Callable[[], Mapping[str, str]] = dict,
        is_free: Callable[[int], bool] = lambda n_bytes: True,
        on_borrowed: Callable[[int], None] = lambda n_bytes: None,
    ) -> Lending:
        """Lend memory to other processes, and borrow theirs for contexts and their attendants.

        Parameters
        ----------
        device, is_free
            See ``Leases``.
        devices, on_borrowed
            See ``Lending``.
        """
        leases = Leases(device, self.device, self._residencies.changed, self._host, is_free)
        lending = self.lending = Lending(leases, devices, on_borrowed)

        def lower(digest: str) -> LowerTier:
            images = ContextImages(self._host, digest)
            return LentTier(images, lending, lambda: self._move(digest))

        self._builder.lower = lower
        self._loads.lending = lending
        return lending

    def _move(self, digest: str) -> None:
        """A lender wants the memory back that a context is in."""
        # Another thread: a copy takes long, and this one may hear of other loans meanwhile.
        move = threading.Thread(target=self._residencies.move, args=(digest,), name="pcm-move-lent")
        move.daemon = True
        move.start()

    def tier(self, digest: str) -> Tier:
        """The tier that holds the context now."""
        with self._residencies.changed:
            residency = self._residencies.by_digest.get(digest)
            return residency.tier if residency else Tier.ABSENT

    def n_loads(self, digest: str) -> int:
        """How often the loader of the context has succeeded in this process."""
        with self._residencies.changed:
            residency = self._residencies.by_digest.get(digest)
            return residency.n_loads if residency else 0

    def size_bytes(self, digest: str) -> int:
        """What the context and its attendant take on the device, in bytes; 0 while unknown."""
        with self._residencies.changed:
            residency = self._residencies.by_digest.get(digest)
            return residency.full_bytes if residency else 0

    def mapped_bytes(self, digest: str) -> int:
        """Host-tier memory that the context maps into this process, in bytes."""
        with self._residencies.changed:
            residency = self._residencies.by_digest.get(digest)
            live = residency.live if residency else None
            return live.mapped_bytes if live else 0

    def host_bytes(self, digest: str) -> int:
        """What the attendant of the context may take of the host's memory, in bytes."""
        return int(getattr(self.attendant(digest), "host_bytes", 0))

    def n_waiting(self) -> int:
        """Rows of attendants that wait since they have no memory."""
        return sum(one.n_waiting() for one in self._borrowing().values())

    def needed_bytes(self) -> dict[str, int]:
        """By context, what rows of its attendant take beside its memory on the device."""
        return {digest: one.needed_bytes() for digest, one in self._borrowing().items()}

    def _borrowing(self) -> dict[str, Borrowing]:
        """Attendants that borrow, by context."""
        with self._residencies.changed:
            found: dict[str, Any] = {
                digest: r.attendant for digest, r in self._residencies.by_digest.items()
            }
        return {digest: one for digest, one in found.items() if isinstance(one, Borrowing)}

    def is_backing_off(self, digest: str) -> bool:
        """Whether the context failed to load and its back-off has not ended.

        The back-off lasts ten times as long as the load took: a context that cannot be loaded
        costs a worker at most a tenth of its time.
        """
        with self._residencies.changed:
            residency = self._residencies.by_digest.get(digest)
            return residency is not None and residency.is_backing_off

    def load(self, ref: ContextRef, again: bool = True) -> Any:
        """Bring the context to the device unless it is there, and return the live object.

        A call that arrives while another thread builds the context waits for that build. After a
        failure the next call tries again, or raises the same error if `again` is False.

        Raises
        ------
        LoadError
            If the loader raises, with its traceback in the message; if the context finds no room
            on the device; or if this process is ending.
        """
        with self._residencies.changed:
            waited = False
            residency = self._residencies.by_digest.setdefault(ref.digest, Residency(ref))
            while residency.tier is Tier.LOADING:
                waited = True
                self.turns.wait(residency, functools.partial(_is_settled, residency))
                # It may have been evicted meanwhile: look it up anew.
                residency = self._residencies.by_digest.setdefault(ref.digest, Residency(ref))
            if residency.tier is Tier.DEVICE:
                return residency.value
            if residency.tier is Tier.FAILED and (waited or not again):
                raise LoadError(residency.error)
            if self._residencies.is_ending:
                raise LoadError(f"Context {ref.name!r} is not loaded: this process is ending.")
            self._residencies.begin_move(residency)
            # An equal recipe may be pickled in another way: the earlier one may not open here.
            residency.ref = ref
            if residency.live is None:  # once built, its measured size counts
                residency.n_bytes = ref.device_memory_bytes or residency.n_bytes
        self._residencies.report(Change(ref.digest, Tier.LOADING))
        return self._loads.bring(residency)

    def offload(self, digest: str) -> bool:
        """Move a context from the device to the host tier; False if held or not on the device.

        A context that cannot be offloaded, or finds no room on the host, is dropped.
        """
        return self._residencies.offload(digest)

    def evict(self, digest: str) -> bool:
        """Drop a context, from the host tier too; False if it is absent, held or loading."""
        return self._residencies.evict(digest)

    def attendant(self, digest: str) -> Attendant | None:
        """What serves the context, which the caller holds; None if nothing does."""
        with self._residencies.changed:
            residency = self._residencies.by_digest.get(digest)
            return residency.attendant if residency else None

    def hold_warm(self, digest: str) -> tuple[Any, Attendant | None, Callable[[], None]] | None:
        """Hold a context if it is on the device; never loads and never waits.

        Returns
        -------
        tuple or None
            The live object, what serves it, and a function that ends the hold, to be called by this
            thread. None if the context is not on the device, or is exclusive: others may have it.
        """
        with self._residencies.changed:
            residency = self._residencies.by_digest.get(digest)
            if residency is None or residency.tier is not Tier.DEVICE or residency.ref.is_exclusive:
                return None
            self._residencies.take(residency)
            let_go = functools.partial(self._residencies.let_go, residency)
            return residency.value, residency.attendant, let_go

    @contextmanager
    def acquire(self, refs: Sequence[ContextRef], again: bool = True) -> Iterator[list[Any]]:
        """Hold the live objects of `refs`, in their order; load what is missing.

        A context that failed to load is tried again, or raises the same error if `again` is
        False. An exclusive context has one holder at a time. An exception in the block does not
        affect the context: it stays on the device.

        Raises
        ------
        LoadError
            If one cannot be loaded.
        DeadlockError
            If this thread holds an exclusive context that the holder of a wanted one waits for.
        """
        values, stack = self.begin_hold(refs, again)
        with stack:
            yield values

    def begin_hold(
        self, refs: Sequence[ContextRef], again: bool = True
    ) -> tuple[list[Any], ExitStack]:
        """As ``acquire``; closing the stack that is returned ends the hold.

        Without context managers in between: Dask's profiler walks the stack of a thread that waits
        here a hundred times a second.
        """
        stack, values = ExitStack(), {}
        try:
            # By digest in every thread: two tasks that want the same contexts never deadlock.
            for ref in sorted(refs, key=lambda ref: ref.digest):
                if ref.digest in values:
                    continue
                residency = self._take(ref, again)
                values[ref.digest] = residency.value
                stack.callback(self._residencies.let_go, residency)
                if ref.is_exclusive:
                    self.turns.begin(residency)
                    stack.callback(self.turns.end, residency)
        except BaseException:
            stack.close()
            raise
        return [values[ref.digest] for ref in refs], stack

    def _take(self, ref: ContextRef, again: bool) -> Residency:
        """Count a hold on a context; load it until it is still there when the hold is counted."""
        while True:
            value = self.load(ref, again)
            with self._residencies.changed:
                residency = self._residencies.by_digest.get(ref.digest)
                # Between load() and here another thread may have evicted it: build it again.
                if residency and residency.tier is Tier.DEVICE and residency.value is value:
                    self._residencies.take(residency)
                    return residency

    def release(self, digest: str) -> None:
        """Evict a context as soon as no task holds it."""
        with self._residencies.changed:
            if (residency := self._residencies.by_digest.get(digest)) is not None:
                residency.is_released = True
        self.evict(digest)

    def close(self) -> None:
        """Evict every context; those that are held, as soon as they are not."""
        self._residencies.is_closed = True
        with self._residencies.changed:
            digests = list(self._residencies.by_digest)
        for digest in digests:
            self.evict(digest)
        if self.lending is not None:
            self.lending.close()

    def end(self) -> None:
        """Refuse further loads: this process is ending and its tasks run again elsewhere."""
        self._residencies.is_ending = True

    def validate(self) -> None:
        """Raise AssertionError if the state contradicts itself."""
        with self._residencies.changed:
            self._residencies.validate()
            self.device.validate()
            if self.lending is not None:
                self.lending.leases.validate()


@functools.cache
def of_process() -> Store:
    """The store of this process for tasks outside a worker that has the plugin."""
    return Store(is_cpu_only=Config.read().is_cpu_only)


def _is_settled(residency: Residency) -> bool:
    """Whether no load or move of the context is under way."""
    return residency.tier is not Tier.LOADING
