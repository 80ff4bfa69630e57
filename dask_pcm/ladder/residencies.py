"""The contexts of this process with their holders: what stays, what moves and what leaves.

One lock guards every residency. Objects are offloaded and closed without it: copying weights and
close hooks take seconds. Meanwhile the context's tier is ``LOADING``, which makes others wait.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dask_pcm.ladder.build import close
from dask_pcm.ladder.objects.host import Host
from dask_pcm.ladder.residency import Attendant, Change, Residency
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)


class Residencies:
    """All residencies of a process, by digest.

    Parameters
    ----------
    on_change
        Called after every change, from the thread that made it and without the lock.
    host
        The host tier, where images of contexts may be.

    Attributes
    ----------
    changed
        Guards every field of every residency; notified when a load, a move or a turn ends.
    is_closed
        Whether every context is evicted as soon as no task holds it.
    is_ending
        Whether the process ends: nothing is loaded, and a load that fails fails because of it.
    """

    def __init__(self, on_change: Callable[[Change], None], host: Host) -> None:
        self.by_digest: dict[str, Residency] = {}
        self.changed = threading.Condition()
        self.is_closed = self.is_ending = False
        self.report = on_change
        self._host = host
        #: Contexts that could not be offloaded, which is said once.
        self._refused: set[str] = set()
        #: Contexts that each thread builds now, the innermost last.
        self._building: dict[int, list[Residency]] = {}

    def take(self, residency: Residency) -> None:
        """Count one hold; with the lock held. A loader's holds last as long as its object."""
        me = threading.get_ident()
        residency.n_holders += 1
        residency.threads[me] += 1
        if builds := self._building.get(me):
            # The object under construction may refer to this one: give_up ends the second hold.
            residency.n_holders += 1
            builds[-1].inner.append(residency)

    def let_go(self, residency: Residency, is_inner: bool = False) -> None:
        """End one hold on a context; evict it if it was released and this was the last."""
        me = threading.get_ident()
        with self.changed:
            residency.n_holders -= 1
            if not is_inner:
                residency.threads -= Counter([me])
            residency.used_at = time.monotonic()
            self.changed.notify_all()
            is_unwanted = self.is_closed or residency.is_released
            is_left = is_unwanted and not residency.n_holders
        if is_left:
            self.evict(residency.ref.digest)

    @contextmanager
    def building(self, residency: Residency) -> Iterator[None]:
        """What this thread acquires within the block belongs to the object that it builds."""
        me = threading.get_ident()
        with self.changed:
            self._building.setdefault(me, []).append(residency)
        try:
            yield
        finally:
            with self.changed:
                self._building[me].pop()

    def begin_move(self, residency: Residency) -> None:
        """Mark a context as moving, which makes other threads wait; with the lock held."""
        residency.tier, residency.user = Tier.LOADING, threading.get_ident()
        residency.error = None

    def end_move(self, residency: Residency, tier: Tier) -> None:
        """Set the tier that a move has led to, wake the threads that wait, and report it."""
        with self.changed:
            residency.tier, residency.user, residency.has_room = tier, None, False
            if tier is Tier.ABSENT:
                del self.by_digest[residency.ref.digest]
            self.changed.notify_all()
        self.report(Change(residency.ref.digest, tier, n_bytes=residency.full_bytes))

    def offload(self, digest: str) -> bool:
        """Move a context from the device to the host tier; False if held or not on the device.

        A context that cannot be offloaded, or finds no room on the host, is dropped.
        """
        with self.changed:
            residency = self.by_digest.get(digest)
            if residency is None or residency.n_holders or residency.tier is not Tier.DEVICE:
                return False
            self.begin_move(residency)
            residency.has_room = True  # its bytes count until the copy has ended
        self.dismiss(residency)
        if self.is_lowered(residency):
            self._settle(residency)
        else:
            self.drop(residency)
        return True

    def move(self, digest: str) -> None:
        """Have a context leave memory that was lent for it; it is dropped if there is no other."""
        with self.changed:
            self.changed.wait_for(lambda: not self._is_moving(digest))
            residency = self.by_digest.get(digest)
            if residency is not None and residency.waits_for_room:
                residency.is_relocated = True
            elif residency is None or residency.tier is not Tier.HOST:
                return  # it is on the device, or gone: then the memory is returned as well
            else:
                self.begin_move(residency)
        if residency.is_relocated:
            self._move_waiting(residency)
            return
        try:
            assert residency.live is not None
            residency.live.move()
        except Exception as error:
            logger.info("Context %r is dropped, as its memory was lent: %s", digest, error)
            self.drop(residency)
        else:
            self._settle(residency)

    def _move_waiting(self, residency: Residency) -> None:
        """Have a context that waits for room on the device leave memory that was lent for it."""
        live = residency.live
        try:
            assert live is not None
            live.move()
        except Exception as error:  # its load builds it anew
            logger.info("Context %r is given up: %s", residency.ref.name, error)
            residency.live = None
            if live is not None:
                live.leave()
                close(residency.ref, live.value)
        finally:
            with self.changed:
                residency.is_relocated = False
                self.changed.notify_all()

    def _settle(self, residency: Residency) -> None:
        """End a move to the host tier; if the context was given up meanwhile, it is dropped."""
        self.end_move(residency, Tier.HOST)
        if self.is_closed or residency.is_released:
            self.evict(residency.ref.digest)

    def _is_moving(self, digest: str) -> bool:
        residency = self.by_digest.get(digest)
        if residency is None or residency.tier is not Tier.LOADING:
            return False
        return residency.is_relocated or not residency.waits_for_room

    def is_lowered(self, residency: Residency) -> bool:
        """Move the object of a context to the host tier; False if that is impossible."""
        live, name = residency.live, residency.ref.name
        try:
            return live is not None and not residency.inner and live.offload()
        except Exception as error:
            is_said = residency.ref.digest in self._refused
            level = logging.INFO if is_said else logging.WARNING
            logger.log(level, "Context %r cannot be offloaded, so it is dropped: %s", name, error)
            self._refused.add(residency.ref.digest)
            return False

    def evict(self, digest: str) -> bool:
        """Drop a context, from the host tier too; False if it is absent, held or loading."""
        with self.changed:
            residency = self.by_digest.get(digest)
            if residency is None or residency.n_holders or residency.tier is Tier.LOADING:
                return False
            residency.has_room = residency.is_there
            self.begin_move(residency)
        self._host.drop(digest)
        self.drop(residency)
        return True

    def drop(self, residency: Residency) -> None:
        """Forget a context whose move has begun."""
        self.give_up(residency)
        self.end_move(residency, Tier.ABSENT)

    def give_up(self, residency: Residency) -> None:
        """Close the live object, free its files, and let go of the contexts that it is made of."""
        self.dismiss(residency)
        live, residency.live = residency.live, None
        with residency.files:
            if live is not None:
                live.leave()
                close(residency.ref, live.value)
        del live  # before the inner contexts go: the object may refer to theirs
        inner, residency.inner = residency.inner, []
        for held in inner:
            self.let_go(held, is_inner=True)

    def dismiss(self, residency: Residency) -> None:
        """Close the attendant of a context, whose object is about to leave the device."""
        attendant, residency.attendant = residency.attendant, None
        if attendant is not None:
            try:
                attendant.close()
            except Exception:
                name = residency.ref.name
                logger.warning("The attendant of context %r did not close", name, exc_info=True)
        with self.changed:
            residency.attendant_bytes = 0
            self.changed.notify_all()

    def stopped(self, residency: Residency, attendant: Attendant) -> None:
        """An attendant has stopped by an error: its context is dropped once no task holds it."""
        with self.changed:
            if residency.attendant is not attendant:
                return
            residency.is_released = True
        # On another thread: this one is the attendant's own, perhaps.
        digest = residency.ref.digest
        threading.Thread(target=self.evict, args=(digest,), name="pcm-evict", daemon=True).start()

    # -- as a tenant of the device --------------------------------------------------------------

    def taken(self) -> Iterator[tuple[str, int]]:
        """See ``Tenant``: what contexts take on the device."""
        for residency in self.by_digest.values():
            if residency.is_there:
                yield residency.ref.name, residency.taken_bytes

    def late(self) -> str:
        """See ``Tenant``: tasks that hold contexts are asked for nothing."""
        return ""

    def holders(self) -> set[int]:
        """See ``Tenant``: threads that hold contexts on the device."""
        there = (residency for residency in self.by_digest.values() if residency.is_there)
        return {thread for residency in there for thread in residency.holding}

    def spare(self, n_bytes: int) -> Callable[[], bool] | None:
        """See ``Tenant``: offloads the idle context that was used least recently."""
        idle = [r for r in self.by_digest.values() if r.tier is Tier.DEVICE and not r.n_holders]
        if not idle:
            return None
        # If the context is acquired in between, ``offload`` refuses.
        return functools.partial(self.offload, min(idle, key=lambda r: r.used_at).ref.digest)

    def validate(self) -> None:
        """Raise AssertionError if residencies contradict themselves; with the lock held."""
        for digest, residency in self.by_digest.items():
            assert residency.ref.digest == digest
            residency.validate()
