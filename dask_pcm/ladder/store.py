"""What is resident in this process: one load for each digest, acquire and release.

The store knows nothing of Dask. Threads of any kind may call it.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import (
    DeviceBusyError,
    DeviceMemoryError,
    DeviceUnusableError,
    LoadError,
    redacted,
)
from dask_pcm.ladder.build import Builder, close
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.objects.images import Host
from dask_pcm.ladder.objects.live import Live
from dask_pcm.ladder.objects.tensors import is_out_of_memory, is_sticky
from dask_pcm.ladder.residency import Change, Residency
from dask_pcm.ladder.turns import Turns
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)

#: A load that failed is not tried again for so many times the seconds that it took.
_REST = 10.0
#: How often a load that waits for room looks whether anybody could still make some.
_LOOK_S = 1.0


class Store:
    """Contexts of this process by digest.

    Parameters
    ----------
    on_change
        Called after every change, from the thread that made it and without the store's lock.
    staging
        What brings files of recipes to this host.
    host
        The host rung; by default one that nobody keeps.
    budget
        Says what contexts may take on the device, in bytes; None for no limit.
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
        self._budget = budget
        self._residencies: dict[str, Residency] = {}
        self._is_closed = self._is_over = False
        # Guards every field of every residency; notified when a load or a turn ends.
        self._changed = threading.Condition()
        self.turns = Turns(self._changed)
        #: Threads that wait for room on the device.
        self._waiting: set[int] = set()
        #: What each thread builds at the moment, the innermost last.
        self._building: dict[int, list[Residency]] = {}

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

    def mapped_bytes(self, digest: str) -> int:
        """Memory of the host rung that the context uses in this process."""
        with self._changed:
            residency = self._residencies.get(digest)
            live = residency.live if residency else None
            return live.mapped_bytes if live else 0

    def is_backing_off(self, digest: str) -> bool:
        """Whether the context failed to load so lately that trying again would not be worth it.

        It rests ten times as long as the load took, so that what cannot be loaded costs little.
        """
        with self._changed:
            residency = self._residencies.get(digest)
            if residency is None or residency.tier is not Tier.FAILED:
                return False
            return time.monotonic() < residency.backoff_until

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
            waited = False
            residency = self._residencies.setdefault(ref.digest, Residency(ref))
            while residency.tier is Tier.LOADING:
                waited = True
                self.turns.wait(residency, functools.partial(_is_settled, residency))
                residency = self._residencies.setdefault(ref.digest, Residency(ref))
            if residency.tier is Tier.DEVICE:
                return residency.value
            if residency.tier is Tier.FAILED and (waited or not again):
                raise LoadError(residency.error)
            if self._is_over:
                raise LoadError(f"Context {ref.name!r} is not loaded: this process is ending.")
            self._begin_move(residency)
            residency.ref = ref  # the same recipe, but perhaps pickled so that it can be opened
            if residency.live is None:  # else it has been measured
                residency.n_bytes = ref.device_memory_bytes or residency.n_bytes
        self._on_change(Change(ref.digest, Tier.LOADING))
        return self._bring(residency)

    def _bring(self, residency: Residency) -> Any:
        start = time.monotonic()
        error, is_built, wrong = None, False, None
        is_up = False
        try:
            self._make_room(residency)
            tried = self._tried(residency)
            # Outside the except clause: what was half built is let go by now.
            is_built = self._up(residency) if tried is None else tried
            is_up = True
            self._measure(residency)
        except DeviceBusyError as cause:  # no fault of its own: whoever asks again may have it
            self._step_back(residency, is_up)
            raise LoadError(_explain(residency.ref, cause)) from cause
        except BaseException as cause:  # also SystemExit: a library that exits is a failed load
            error, wrong = _explain(residency.ref, cause), cause
            logger.warning("%s", error)
            self._give_up(residency)
        seconds = time.monotonic() - start
        with self._changed:
            residency.tier, residency.user = (
                Tier.FAILED if error else Tier.DEVICE,
                None,
            )
            residency.error, residency.has_room = error, False
            residency.n_loads += is_built and not error
            residency.used_at = time.monotonic()
            residency.backoff_until = time.monotonic() + _REST * seconds
            self._changed.notify_all()
        self._on_change(
            Change(
                residency.ref.digest,
                residency.tier,
                seconds,
                error,
                is_built,
                residency.n_bytes,
                _kind(wrong),
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
        if residency.is_released:  # meanwhile; whoever holds it by now has it for as long
            self.evict(residency.ref.digest)
        return value

    def _step_back(self, residency: Residency, is_up: bool) -> None:
        """Others hold on to the device: it stays, or goes, where it takes no room there."""
        live = residency.live
        try:
            if live is not None and (not is_up or (not residency.inner and live.offload())):
                self._end_move(residency, Tier.HOST)
                return
        except Exception as error:
            logger.warning("Context %r is dropped: %r", residency.ref.name, error)
        self._drop(residency)

    def _tried(self, residency: Residency) -> bool | None:
        """As ``_up``; None where there was no memory, and others have made room since."""
        try:
            return self._up(residency)
        except BaseException as cause:
            if not is_out_of_memory(cause) or not self._offload_idle():
                raise
            logger.warning("No memory for %r: others made room", residency.ref.name)
            return None

    def _keep(self, residency: Residency, live: Live) -> None:
        """Have a context outlive the process; whoever wants it has it already."""
        with self._changed:
            is_over = self._is_closed or residency.is_released
            if is_over or residency.tier is not Tier.DEVICE or residency.live is not live:
                return
            self._take(residency)
        try:
            self._builder.keep(residency.ref, live)
        finally:
            self._let_go(residency)

    def _let_go(self, residency: Residency, is_inner: bool = False) -> None:
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
        """Bring a context to the device; whether its loader was called for it."""
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

    def _measure(self, residency: Residency) -> None:
        """See what a context takes, now that it is there; others may have to leave."""
        assert residency.live is not None
        inner = [r.live for r in residency.inner if r.live is not None]
        found = residency.live.bytes_beside(inner)
        if found > residency.n_bytes:
            residency.n_bytes = found
            self._make_room(residency)

    def _give_up(self, residency: Residency) -> None:
        live, residency.live = residency.live, None
        with residency.files:
            if live is not None:
                close(residency.ref, live.value)
        del live
        inner, residency.inner = residency.inner, []
        for held in inner:
            self._let_go(held, is_inner=True)

    def _make_room(self, wanted: Residency) -> None:
        """Have others that nobody holds leave the device, the least lately used first."""
        budget = self._budget()
        if budget is None:
            return
        if wanted.n_bytes > budget:
            raise DeviceMemoryError(
                f"Context {wanted.ref.name!r} takes {wanted.n_bytes:,} bytes on the device, which"
                f" has {budget:,} for contexts (pcm.ladder.device.budget). Use a smaller model or"
                " data type, or workers with larger devices."
            )
        while True:
            with self._changed:
                there = [r for r in self._residencies.values() if r is not wanted and r.is_there]
                if sum(r.n_bytes for r in there) + wanted.n_bytes <= budget:
                    wanted.has_room = True
                    return
                idle = [r for r in there if r.tier is Tier.DEVICE and not r.n_holders]
                if not idle:
                    self._wait_for_room(wanted, there, budget)
            if idle:
                self.offload(min(idle, key=lambda r: r.used_at).ref.digest)

    def _wait_for_room(self, wanted: Residency, there: list[Residency], budget: int) -> None:
        """Wait for a change; with the lock. Not where everybody waits for everybody else."""
        me = threading.get_ident()
        holders = {thread for residency in there for thread in residency.holding}
        if all(self.turns.leads_to(thread, self._waiting | {me}) for thread in holders):
            names = ", ".join(f"{r.ref.name!r} ({r.n_bytes:,})" for r in there)
            raise DeviceBusyError(
                f"Context {wanted.ref.name!r} takes {wanted.n_bytes:,} bytes; the device has"
                f" {budget:,} for contexts, and the tasks that hold on to {names} wait for room as"
                " well. Take contexts that are used together at once, so that the gate sees both."
            )
        self._waiting.add(me)
        try:
            self._changed.wait(_LOOK_S)
        finally:
            self._waiting.discard(me)

    def _offload_idle(self) -> bool:
        """Have all that nobody holds leave the device; whether there was anything."""
        with self._changed:
            digests = [d for d, r in self._residencies.items() if r.tier is Tier.DEVICE]
        return sum(map(self.offload, digests)) > 0

    def offload(self, digest: str) -> bool:
        """Have a context go down a rung; False if it is held or not on the device.

        Where there is no way down, or no room there, it is dropped.
        """
        with self._changed:
            residency = self._residencies.get(digest)
            if residency is None or residency.n_holders or residency.tier is not Tier.DEVICE:
                return False
            self._begin_move(residency)
            residency.has_room = True  # still there
        live = residency.live
        assert live is not None
        try:
            is_offloaded = not residency.inner and live.offload()
        except Exception as error:
            logger.warning("Context %r is dropped: %r", residency.ref.name, error)
            is_offloaded = False
        if is_offloaded:
            self._end_move(residency, Tier.HOST)
        else:
            self._drop(residency)
        return True

    def evict(self, digest: str) -> bool:
        """Drop a context that nobody holds, from the host rung too; False if it is not here."""
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
        """Nobody else may have it until it has arrived; with the store's lock."""
        residency.tier, residency.user = Tier.LOADING, threading.get_ident()
        residency.error = None

    def _end_move(self, residency: Residency, tier: Tier) -> None:
        with self._changed:
            residency.tier, residency.user, residency.has_room = tier, None, False
            if tier is Tier.ABSENT:
                del self._residencies[residency.ref.digest]
            self._changed.notify_all()
        self._on_change(Change(residency.ref.digest, tier, n_bytes=residency.n_bytes))

    def _drop(self, residency: Residency) -> None:
        self._give_up(residency)
        self._end_move(residency, Tier.ABSENT)

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
                    self._take(residency)
                    break
        try:
            with self.turns.taken(residency) if ref.is_exclusive else nullcontext():
                yield value
        finally:
            self._let_go(residency)

    def _take(self, residency: Residency) -> None:
        """Hold it; with the lock. What a loader takes, its object may be made of."""
        me = threading.get_ident()
        residency.n_holders += 1
        residency.threads[me] += 1
        if builds := self._building.get(me):
            residency.n_holders += 1  # until the object is dropped
            builds[-1].inner.append(residency)

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

    def end(self) -> None:
        """Load nothing any more: the process ends, and whoever still asks works for nobody."""
        self._is_over = True

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
                has_live = residency.live is not None
                assert has_live or residency.tier not in (
                    Tier.DEVICE,
                    Tier.HOST,
                ), digest
            budget = self._budget()
            there = sum(r.n_bytes for r in self._residencies.values() if r.is_there)
            assert budget is None or there <= budget, (there, budget)


@functools.cache
def of_process() -> Store:
    """The store of tasks that no worker plugin cares for."""
    return Store(is_cpu_only=Config.read().is_cpu_only)


def _explain(ref: ContextRef, cause: BaseException) -> str:
    text = redacted("".join(traceback.format_exception(cause)).rstrip())
    return f"Context {ref.name!r} could not be loaded:\n\n{text}"


def _kind(cause: BaseException | None) -> str:
    """What kind of thing went wrong; "device" is the node's fault, and no luck of one context."""
    if isinstance(cause, DeviceUnusableError):
        return "device"
    return "" if cause is None else type(cause).__name__


def _is_settled(residency: Residency) -> bool:
    return residency.tier is not Tier.LOADING
