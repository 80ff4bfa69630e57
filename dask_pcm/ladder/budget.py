"""Room on the device: bytes are taken there only once they fit the budget.

Several tenants share a device: the contexts, and the neighbours that it is lent to. To make room, a
tenant is asked to give back what it can spare. If none can, the request waits, unless those that
keep the memory wait for room as well.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dask_pcm.errors import DeviceBusyError, DeviceMemoryError
from dask_pcm.ladder.turns import Turns

#: How often a request that waits for room checks for a deadlock: the beginning of a holder's own
#: wait notifies no other thread.
_POLL_S = 1.0


class Tenant(Protocol):
    """Takes memory of a device, and can give some of it back."""

    def taken(self) -> Iterable[tuple[str, int]]:
        """What it takes, by name, in bytes; called with the budget's lock held."""

    def holders(self) -> set[int]:
        """Threads without which it could give back more; called with the budget's lock held."""

    def late(self) -> str:
        """Who was asked for memory in vain, in a sentence, or "". With the lock held."""

    def spare(self, n_bytes: int) -> Callable[[], bool] | None:
        """What gives back some memory; None if there is nothing to spare now.

        Called with the budget's lock held. What it returns is called without the lock, since
        copying weights takes seconds. It returns whether it gave back anything: what was idle may
        be in use by then, and is not to spare any more.

        Parameters
        ----------
        n_bytes
            What is lacking; it may give back more, or less.
        """


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes that are wanted on the device.

    Attributes
    ----------
    name
        What wants them, for messages.
    n_bytes
        What it takes there in all.
    counted_bytes
        The part that its tenant counts as taken already.
    """

    name: str
    n_bytes: int
    counted_bytes: int = 0


class DeviceBudget:
    """Keeps the bytes of all tenants of a device within a limit.

    Methods may be called from any thread, without the lock.

    Parameters
    ----------
    limit_bytes
        Returns what tenants may take on the device, in bytes; None for no limit.
    changed
        The lock, notified when a tenant has given back memory, or a turn ends.
    turns
        Says which thread waits for which.
    """

    def __init__(
        self, limit_bytes: Callable[[], int | None], changed: threading.Condition, turns: Turns
    ) -> None:
        self._limit_bytes = limit_bytes
        self._changed = changed
        self._turns = turns
        self._tenants: list[Tenant] = []
        #: Threads that wait for room on the device.
        self._waiting: set[int] = set()
        #: Requests that are not granted yet.
        self._n_wanting = 0

    def add(self, tenant: Tenant, is_first: bool = False) -> None:
        """Add a tenant; it is asked for what it can spare after the others, or before them."""
        with self._changed:
            self._tenants.insert(0 if is_first else len(self._tenants), tenant)

    def remove(self, tenant: Tenant) -> None:
        """Remove a tenant, which takes nothing any more."""
        with self._changed:
            self._tenants.remove(tenant)
            self._changed.notify_all()

    def reserve(self, request: Request, grant: Callable[[], object]) -> None:
        """Make room, then call `grant`, which has the tenant count the bytes as taken.

        `grant` is called with the lock held, so that two requests never count on one gap.

        Raises
        ------
        DeviceMemoryError
            If the request alone exceeds the budget.
        DeviceBusyError
            If every thread that keeps memory of the device waits for room as well.
        """
        limit = self._limit_bytes()
        if limit is not None and request.n_bytes > limit:
            raise DeviceMemoryError(
                f"Context {request.name!r} takes {request.n_bytes:,} bytes on the device, which"
                f" has {limit:,} for contexts (pcm.ladder.device.budget). Use a smaller model or"
                " data type, or workers with larger devices."
            )
        with self._changed:
            self._n_wanting += 1
        try:
            self._reserve(request, grant, limit)
        finally:
            with self._changed:
                self._n_wanting -= 1

    def _reserve(self, request: Request, grant: Callable[[], object], limit: int | None) -> None:
        """Make room until a request fits."""
        while True:
            with self._changed:
                wanted = request.n_bytes - request.counted_bytes
                if limit is None or self._taken_bytes() + wanted <= limit:
                    # Still with the lock: two requests must not count on one gap.
                    grant()
                    return
                give_back = self._spare(self._taken_bytes() + wanted - limit)
                if give_back is None:
                    self._wait_for_room(request, limit)
            if give_back is not None:
                # Without the lock, so tasks go on meanwhile. Another request may take the gap.
                give_back()

    def reserve_spare(self, n_bytes: int, grant: Callable[[], bool]) -> bool:
        """As ``reserve``, but of what is free; False if that is too little, or `grant` says so.

        Also while another request makes room, and without a limit: then it is not known what is
        free.
        """
        limit = self._limit_bytes()
        with self._changed:
            if limit is None or self._n_wanting or self._taken_bytes() + n_bytes > limit:
                return False
            return grant()

    def reclaim(self) -> bool:
        """Have every tenant give back what it can spare; False if there was nothing."""
        is_any = False
        while True:
            with self._changed:
                give_back = self._spare(sys.maxsize)
            if give_back is None:
                return is_any
            is_any = bool(give_back()) or is_any

    def validate(self) -> None:
        """Raise AssertionError if tenants take more than the budget; with the lock held."""
        limit = self._limit_bytes()
        assert limit is None or self._taken_bytes() <= limit, (self._taken_bytes(), limit)

    def _taken_bytes(self) -> int:
        return sum(n_bytes for tenant in self._tenants for _, n_bytes in tenant.taken())

    def _spare(self, n_bytes: int) -> Callable[[], bool] | None:
        given = (tenant.spare(n_bytes) for tenant in self._tenants)
        return next((give_back for give_back in given if give_back is not None), None)

    def _wait_for_room(self, request: Request, limit: int) -> None:
        """Wait for a change; with the lock held. Refuse if nothing can ever make room."""
        me = threading.get_ident()
        holders = {thread for tenant in self._tenants for thread in tenant.holders()}
        if all(self._turns.leads_to(thread, self._waiting | {me}) for thread in holders):
            raise DeviceBusyError(self._text(request, limit))
        self._waiting.add(me)
        try:
            self._changed.wait(_POLL_S)
        finally:
            self._waiting.discard(me)

    def _text(self, request: Request, limit: int) -> str:
        lacks = (
            f"Context {request.name!r} takes {request.n_bytes:,} bytes; the device has {limit:,}"
            " for contexts"
        )
        taken: Sequence[tuple[str, int]] = [one for t in self._tenants for one in t.taken()]
        names = ", ".join(f"{name!r} ({n_bytes:,})" for name, n_bytes in taken)
        if late := " ".join(text for tenant in self._tenants if (text := tenant.late())):
            return f"{lacks}, of which {names} are in use. {late}"
        return (
            f"{lacks}, and the tasks that hold {names} wait for room as well. Acquire contexts that"
            " are used together in one call, so that the gate sees both."
        )
