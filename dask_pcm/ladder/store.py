"""The contexts of this process: each is built once, then shared by every task that acquires it.

The store does not depend on Dask. Every public method may be called from any thread.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import DeviceBusyError, LoadError
from dask_pcm.ladder.budget import DeviceBudget
from dask_pcm.ladder.build import Builder, close, failure_kind, failure_text
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.objects.images import Host
from dask_pcm.ladder.objects.live import Live
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.ladder.residency import Change, Residency
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
        self._on_change = on_change or (lambda change: None)
        self._host = host or Host()
        self._builder = Builder(staging or Staging(), self._host, is_mapped, is_cpu_only)
        self._residencies: dict[str, Residency] = {}
        self._is_closed = self._is_over = False
        #: Guards every field of every residency; notified when a load, a move or a turn ends.
        self._changed = threading.Condition()
        self.turns = Turns(self._changed)
        self._device = DeviceBudget(
            budget, self._residencies, self._changed, self.turns, self.offload
        )
        #: Contexts that each thread builds now, the innermost last.
        self._building: dict[int, list[Residency]] = {}

    def tier(self, digest: str) -> Tier:
        """The tier that holds the context now."""
        with self._changed:
            residency = self._residencies.get(digest)
            return residency.tier if residency else Tier.ABSENT

    def n_loads(self, digest: str) -> int:
        """How often the loader of the context has succeeded in this process."""
        with self._changed:
            residency = self._residencies.get(digest)
            return residency.n_loads if residency else 0

    def mapped_bytes(self, digest: str) -> int:
        """Host-tier memory that the context maps into this process, in bytes."""
        with self._changed:
            residency = self._residencies.get(digest)
            live = residency.live if residency else None
            return live.mapped_bytes if live else 0

    def is_backing_off(self, digest: str) -> bool:
        """Whether the context failed to load and its back-off has not ended.

        The back-off lasts ten times as long as the load took: a context that cannot be loaded
        costs a worker at most a tenth of its time.
        """
        with self._changed:
            residency = self._residencies.get(digest)
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
        with self._changed:
            waited = False
            residency = self._residencies.setdefault(ref.digest, Residency(ref))
            while residency.tier is Tier.LOADING:
                waited = True
                self.turns.wait(residency, functools.partial(_is_settled, residency))
                # It may have been evicted meanwhile: look it up anew.
                residency = self._residencies.setdefault(ref.digest, Residency(ref))
            if residency.tier is Tier.DEVICE:
                return residency.value
            if residency.tier is Tier.FAILED and (waited or not again):
                raise LoadError(residency.error)
            if self._is_over:
                raise LoadError(f"Context {ref.name!r} is not loaded: this process is ending.")
            self._begin_move(residency)
            # An equal recipe may be pickled in another way: the earlier one may not open here.
            residency.ref = ref
            if residency.live is None:  # once built, its measured size counts
                residency.n_bytes = ref.device_memory_bytes or residency.n_bytes
        self._on_change(Change(ref.digest, Tier.LOADING))
        return self._bring(residency)

    def _bring(self, residency: Residency) -> Any:
        """Bring a context whose move has begun to the device; report and return the live object."""
        start = time.monotonic()
        error, is_built, wrong = None, False, None
        is_up = False
        try:
            is_built = self._device.bring(residency, self._up)
            is_up = True
            self._device.measure(residency)
        except DeviceBusyError as cause:  # not the recipe's fault: no FAILED, no back-off
            self._step_back(residency, is_up)
            raise LoadError(failure_text(residency.ref, cause)) from cause
        except BaseException as cause:  # SystemExit too: a library that exits is a failed load
            error, wrong = failure_text(residency.ref, cause), cause
            logger.warning("%s", error)
            self._give_up(residency)
        seconds = time.monotonic() - start
        with self._changed:
            residency.end_load(error, is_built, seconds)
            self._changed.notify_all()
        self._on_change(
            Change(
                residency.ref.digest,
                residency.tier,
                seconds,
                error,
                is_built,
                residency.n_bytes,
                failure_kind(wrong),
                is_sticky(wrong),
                self._builder.staged_s.get(residency.ref.digest, 0.0) if is_built else 0.0,
            )
        )
        if error:
            raise LoadError(error)
        live = residency.live
        value = residency.value
        if is_built and live is not None:
            self._keep(residency, live)
        if residency.is_released:  # during the load; does nothing if a task holds it by now
            self.evict(residency.ref.digest)
        return value

    def _step_back(self, residency: Residency, is_up: bool) -> None:
        """Abandon a load for which there is no room: back to the host tier, or drop the context."""
        live = residency.live
        try:
            if live is not None and (not is_up or (not residency.inner and live.offload())):
                self._end_move(residency, Tier.HOST)
                return
        except Exception as error:
            logger.warning(
                "Context %r cannot be offloaded, so it is dropped: %r", residency.ref.name, error
            )
        self._drop(residency)

    def _keep(self, residency: Residency, live: Live) -> None:
        """Copy a newly built context to the host tier; tasks use it meanwhile."""
        with self._changed:
            is_over = self._is_closed or residency.is_released
            if is_over or residency.tier is not Tier.DEVICE or residency.live is not live:
                return
            self._take(residency)  # so that it is not evicted while its tensors are copied
        try:
            self._builder.keep(residency.ref, live)
        finally:
            self._let_go(residency)

    def _let_go(self, residency: Residency, is_inner: bool = False) -> None:
        """End one hold on a context; evict it if it was released and this was the last."""
        me = threading.get_ident()
        with self._changed:
            residency.n_holders -= 1
            if not is_inner:
                residency.threads -= Counter([me])
            residency.used_at = time.monotonic()
            self._changed.notify_all()
            is_unwanted = self._is_closed or residency.is_released
            is_left = is_unwanted and not residency.n_holders
        if is_left:
            self.evict(residency.ref.digest)

    def _up(self, residency: Residency) -> bool:
        """Restore, reattach or build a context; True if its loader was called."""
        if residency.live is not None:
            residency.live.restore()
            return False
        residency.live = self._builder.found(residency.ref, residency.files)
        if residency.live is not None:
            return False
        me = threading.get_ident()
        with self._changed:
            self._building.setdefault(me, []).append(residency)
        try:
            residency.live = self._builder.built(residency.ref, residency.files)
        finally:
            with self._changed:
                self._building[me].pop()
        return True

    def _give_up(self, residency: Residency) -> None:
        """Close the live object, free its files, and let go of the contexts that it is made of."""
        live, residency.live = residency.live, None
        with residency.files:
            if live is not None:
                close(residency.ref, live.value)
        del live  # before the inner contexts go: the object may refer to theirs
        inner, residency.inner = residency.inner, []
        for held in inner:
            self._let_go(held, is_inner=True)

    def offload(self, digest: str) -> bool:
        """Move a context from the device to the host tier; False if held or not on the device.

        A context that cannot be offloaded, or finds no room on the host, is dropped.
        """
        with self._changed:
            residency = self._residencies.get(digest)
            if residency is None or residency.n_holders or residency.tier is not Tier.DEVICE:
                return False
            self._begin_move(residency)
            residency.has_room = True  # its bytes count until the copy has ended
        live = residency.live
        assert live is not None
        try:
            is_offloaded = not residency.inner and live.offload()
        except Exception as error:
            logger.warning(
                "Context %r cannot be offloaded, so it is dropped: %r", residency.ref.name, error
            )
            is_offloaded = False
        if is_offloaded:
            self._end_move(residency, Tier.HOST)
        else:
            self._drop(residency)
        return True

    def evict(self, digest: str) -> bool:
        """Drop a context, from the host tier too; False if it is absent, held or loading."""
        with self._changed:
            residency = self._residencies.get(digest)
            if residency is None or residency.n_holders or residency.tier is Tier.LOADING:
                return False
            residency.has_room = residency.is_there
            self._begin_move(residency)
        self._host.drop(digest)
        self._drop(residency)
        return True

    def _begin_move(self, residency: Residency) -> None:
        """Mark a context as moving, which makes other threads wait; with the lock held."""
        residency.tier, residency.user = Tier.LOADING, threading.get_ident()
        residency.error = None

    def _end_move(self, residency: Residency, tier: Tier) -> None:
        """Set the tier that a move has led to, wake the threads that wait, and report it."""
        with self._changed:
            residency.tier, residency.user, residency.has_room = tier, None, False
            if tier is Tier.ABSENT:
                del self._residencies[residency.ref.digest]
            self._changed.notify_all()
        self._on_change(Change(residency.ref.digest, tier, n_bytes=residency.n_bytes))

    def _drop(self, residency: Residency) -> None:
        """Forget a context whose move has begun."""
        self._give_up(residency)
        self._end_move(residency, Tier.ABSENT)

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
        with ExitStack() as stack:
            held = {}
            # By digest in every thread: two tasks that want the same contexts never deadlock.
            for ref in sorted(refs, key=lambda ref: ref.digest):
                if ref.digest not in held:
                    held[ref.digest] = stack.enter_context(self._hold(ref, again))
            yield [held[ref.digest] for ref in refs]

    @contextmanager
    def _hold(self, ref: ContextRef, again: bool) -> Iterator[Any]:
        """Hold one live object; loads it until it is still there when the hold is counted."""
        while True:
            value = self.load(ref, again)
            with self._changed:
                residency = self._residencies.get(ref.digest)
                # Between load() and here another thread may have evicted it: build it again.
                if residency and residency.tier is Tier.DEVICE and residency.value is value:
                    self._take(residency)
                    break
        try:
            with self.turns.taken(residency) if ref.is_exclusive else nullcontext():
                yield value
        finally:
            self._let_go(residency)

    def _take(self, residency: Residency) -> None:
        """Count one hold; with the lock held. A loader's holds last as long as its object."""
        me = threading.get_ident()
        residency.n_holders += 1
        residency.threads[me] += 1
        if builds := self._building.get(me):
            # The object under construction may refer to this one: _give_up ends the second hold.
            residency.n_holders += 1
            builds[-1].inner.append(residency)

    def release(self, digest: str) -> None:
        """Evict a context as soon as no task holds it."""
        with self._changed:
            if (residency := self._residencies.get(digest)) is not None:
                residency.is_released = True
        self.evict(digest)

    def close(self) -> None:
        """Evict every context; those that are held, as soon as they are not."""
        self._is_closed = True
        self.clear()

    def end(self) -> None:
        """Refuse further loads: this process is ending and its tasks run again elsewhere."""
        self._is_over = True

    def clear(self) -> None:
        """Evict every context that no task holds."""
        with self._changed:
            digests = list(self._residencies)
        for digest in digests:
            self.evict(digest)

    def validate(self) -> None:
        """Raise AssertionError if the state contradicts itself."""
        with self._changed:
            for digest, residency in self._residencies.items():
                assert residency.ref.digest == digest
                residency.validate()
            self._device.validate()


@functools.cache
def of_process() -> Store:
    """The store of this process for tasks outside a worker that has the plugin."""
    return Store(is_cpu_only=Config.read().is_cpu_only)


def _is_settled(residency: Residency) -> bool:
    """Whether no load or move of the context is under way."""
    return residency.tier is not Tier.LOADING
