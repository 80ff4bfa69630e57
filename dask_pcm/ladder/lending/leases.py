"""What a worker has lent of its memory, to whom, and how it gets it back.

A lease is of memory of the host, or of a device. What is lent of a device counts in its budget: the
leases are a tenant of it, and the first one that is asked for room. The borrower takes the memory
of a device itself; its driver frees it if the borrower dies. Memory of the host is taken here, and
so belongs to the lender's job: see ``Host.lend``.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dask_pcm.ladder.budget import DeviceBudget
from dask_pcm.ladder.objects.host import Host

logger = logging.getLogger(__name__)

#: Memory of the host, as opposed to that of a device, which goes by its name.
HOST = "host"
#: How long memory is waited for after it was asked back; borrowers need the rest of a step and a
#: copy. A load that needs the memory of a borrower that hangs waits longer before it is refused.
_WAIT_S, _OVERDUE_S = 10.0, 60.0


@dataclass(slots=True, eq=False)
class Lease:
    """A part of the lender's memory that a borrower has.

    Attributes
    ----------
    epoch
        Its number; higher than that of every earlier lease of the lender.
    medium
        ``HOST``, or the name of a device.
    ask_back
        Asks the borrower to return it. Called on any thread, without locks.
    is_fixed
        Whether it lasts as long as the borrower. It counts for what is lent, and takes no room
        from the lender's own contexts: their budget leaves some of the device.
    is_own
        Whether the borrower is the lender itself.
    asked_at
        When it was asked back, by the monotonic clock.
    """

    epoch: int
    medium: str
    n_bytes: int
    borrower: str
    ask_back: Callable[[], None]
    is_fixed: bool = False
    is_own: bool = False
    asked_at: float | None = None

    @property
    def is_overdue(self) -> bool:
        """Whether it was asked back in vain."""
        return self.asked_at is not None and time.monotonic() > self.asked_at + _WAIT_S


class Leases:
    """The leases of a lender; a tenant of its device. For any thread.

    Parameters
    ----------
    device
        The name of the lender's device; None if that cannot be lent.
    budget
        That of the device.
    changed
        The lock of the budget.
    host
        The host tier.
    is_free
        Whether a device has as many bytes to spare, beside what its budget says.

    Attributes
    ----------
    is_offering
        Whether memory is lent to others; see ``Informer``.
    """

    def __init__(
        self,
        device: Callable[[], str | None],
        budget: DeviceBudget,
        changed: threading.Condition,
        host: Host,
        is_free: Callable[[int], bool] = lambda n_bytes: True,
    ) -> None:
        self._device = device
        self._budget = budget
        self._changed = changed
        self._host = host
        self._is_free = is_free
        self._leases: list[Lease] = []
        self._epochs = itertools.count(1)
        self.is_offering = True
        self._is_closed = False
        budget.add(self, is_first=True)
        host.make_room = lambda n_bytes: self.reclaim(HOST, n_bytes)

    def grant(
        self,
        medium: str,
        n_bytes: int,
        borrower: str,
        ask_back: Callable[[], None],
        is_fixed: bool = False,
        is_own: bool = False,
    ) -> tuple[Lease, int | None] | None:
        """Lend memory; None if there is none to spare.

        Memory is never taken from contexts or images for it, and none is lent while some of it is
        asked back.

        Parameters
        ----------
        is_own
            Whether the borrower is this worker itself, which may have what is offered to no other.

        Returns
        -------
        tuple
            The lease, and for memory of the host a file descriptor of it, which the caller closes.
        """
        if n_bytes <= 0:
            return None
        lease = Lease(next(self._epochs), medium, n_bytes, borrower, ask_back, is_fixed, is_own)
        if medium != HOST:
            if medium != self._device() or not self._is_free(n_bytes):
                return None
            n_fixed = 0 if is_own else self._fixed_bytes()
            is_granted = self._budget.reserve_spare(n_bytes + n_fixed, lambda: self._added(lease))
            return (lease, None) if is_granted else None
        fd = None if self._is_refused(lease) else self._host.lend(lease.epoch, n_bytes)
        if fd is None:
            return None
        with self._changed:
            if self._added(lease):
                return lease, fd
        os.close(fd)
        self._host.end_loan(lease.epoch)
        return None

    def _added(self, lease: Lease) -> bool:
        """Add a lease unless it is refused by now; with the lock held."""
        if self._is_refused(lease):
            return False
        self._leases.append(lease)
        return True

    def _fixed_bytes(self) -> int:
        with self._changed:
            return sum(one.n_bytes for one in self._leases if one.is_fixed)

    def _is_refused(self, lease: Lease) -> bool:
        with self._changed:
            # What hangs for so long is not waited for any more, either.
            since = time.monotonic() - _OVERDUE_S
            same = [one for one in self._leases if one.medium == lease.medium]
            is_asked = any(one.asked_at is not None and one.asked_at > since for one in same)
            is_offered = self.is_offering or lease.is_own
            return is_asked or self._is_closed or not is_offered

    def end(self, lease: Lease) -> None:
        """A borrower has returned its memory, or is dead."""
        with self._changed:
            if lease not in self._leases:
                return
        if lease.medium == HOST:  # first: who waits for the memory takes it at once
            self._host.end_loan(lease.epoch)
        with self._changed:
            if lease in self._leases:
                self._leases.remove(lease)
            self._changed.notify_all()

    def reclaim(
        self, medium: str | None = None, n_bytes: int | None = None, with_own: bool = True
    ) -> bool:
        """Ask borrowers for memory and wait until it is back; False if none came back in time.

        Parameters
        ----------
        medium
            By default, all.
        n_bytes
            What is needed; the latest leases go first. By default, all.
        with_own
            Whether this worker's own engines are asked, too.
        """
        with self._changed:
            wanted = [one for one in self._leases[::-1] if medium in (None, one.medium)]
            mine = [one for one in wanted if not one.is_fixed and (with_own or not one.is_own)]
            wanted = list(_enough(mine, n_bytes))
            new = [one for one in wanted if one.asked_at is None]
            for lease in new:
                lease.asked_at = time.monotonic()
            # Those that hang are not waited for once more.
            awaited = [one for one in wanted if not one.is_overdue]
        for lease in new:
            lease.ask_back()
        with self._changed:
            self._changed.wait_for(lambda: not self._left(awaited), _WAIT_S)
            left = self._left(wanted)
        for lease in left if new else ():
            logger.warning(
                "%s has not returned %s bytes (%s) that it was lent, %.0f s after they were asked"
                " back. They come back if it does or when its process ends.",
                *(lease.borrower, f"{lease.n_bytes:,}", lease.medium, _WAIT_S),
            )
        return len(left) < len(wanted)

    def reclaim_device(self) -> None:
        """Have all memory of a GPU back that was lent: what is free there is measured next."""
        medium = self._device()
        if medium not in (None, "cpu") and self.lent_bytes(medium):
            self.reclaim(medium)

    def lent_bytes(self, medium: str | None = None) -> int:
        """What is lent now; by default, of all media."""
        with self._changed:
            mine = [one for one in self._leases if medium in (None, one.medium)]
            return sum(one.n_bytes for one in mine)

    def close(self) -> None:
        """Lend nothing more; the device's budget forgets what is lent."""
        with self._changed:
            is_new, self._is_closed = not self._is_closed, True
        if is_new:
            self._host.make_room = None
            self._budget.remove(self)
        with self._changed:
            left, self._leases = self._leases, []
            self._changed.notify_all()
        for lease in left:
            if lease.medium == HOST:
                self._host.end_loan(lease.epoch)

    def _left(self, wanted: list[Lease]) -> list[Lease]:
        return [one for one in wanted if one in self._leases]

    # -- as a tenant of the device --------------------------------------------------------------

    def taken(self) -> Iterator[tuple[str, int]]:
        """See ``Tenant``."""
        for lease in self._leases:
            if lease.medium != HOST and not lease.is_fixed:
                yield f"lent to {lease.borrower}", lease.n_bytes

    def holders(self) -> set[int]:
        """See ``Tenant``: no thread's number, while memory may still come back."""
        asked = [one.asked_at for one in self._leases if one.medium != HOST and one.asked_at]
        return {0} if any(time.monotonic() < at + _OVERDUE_S for at in asked) else set()

    def late(self) -> str:
        """See ``Tenant``."""
        now = time.monotonic()
        return " ".join(
            f"{lease.borrower} was lent {lease.n_bytes:,} of them, and has not returned them"
            f" {now - lease.asked_at:.0f} s after it was asked to: end its process if it hangs."
            for lease in self._leases
            if lease.medium != HOST and lease.asked_at is not None and lease.is_overdue
        )

    def spare(self, n_bytes: int) -> Callable[[], bool] | None:
        """See ``Tenant``: asks borrowers for memory and waits for it."""
        device = [one for one in self._leases if one.medium != HOST and not one.is_fixed]
        if all(lease.is_overdue for lease in device):
            return None
        return lambda: self.reclaim(device[0].medium, n_bytes)

    def validate(self) -> None:
        """Raise AssertionError if the leases contradict each other."""
        with self._changed:
            epochs = [lease.epoch for lease in self._leases]
            assert len(set(epochs)) == len(epochs), epochs
            assert all(lease.n_bytes > 0 for lease in self._leases)


def _enough(leases: list[Lease], n_bytes: int | None) -> Iterator[Lease]:
    """The first leases that have as many bytes together; those that hang do not count."""
    for lease in leases:
        if n_bytes is not None and n_bytes <= 0:
            return
        yield lease
        if n_bytes is not None and not lease.is_overdue:
            n_bytes -= lease.n_bytes
