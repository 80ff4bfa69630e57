"""Room on the device: a context is brought there only once its bytes fit the budget.

To make room, idle contexts are offloaded, least recently used first. Where every context is in use,
the load waits, unless the tasks that use them wait for room as well.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from dask_pcm.errors import DeviceBusyError, DeviceMemoryError
from dask_pcm.ladder.objects.tensors import is_out_of_memory
from dask_pcm.ladder.residency import Residency
from dask_pcm.ladder.turns import Turns
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)

#: How often a load that waits for room checks for a deadlock: the beginning of a holder's own wait
#: notifies no other thread.
_POLL_S = 1.0


class DeviceBudget:
    """Keeps the bytes of contexts on the device within a limit.

    Methods may be called from any thread, without the store's lock.

    Parameters
    ----------
    limit_bytes
        Returns what contexts may take on the device, in bytes; None for no limit.
    residencies
        The store's own mapping, by digest; read with the lock held.
    changed
        The store's lock, notified when a load, a move or a turn ends.
    turns
        Says which thread waits for which.
    offload
        Offloads a context by digest; False if it is held or not on the device.
    """

    def __init__(
        self,
        limit_bytes: Callable[[], int | None],
        residencies: Mapping[str, Residency],
        changed: threading.Condition,
        turns: Turns,
        offload: Callable[[str], bool],
    ) -> None:
        self._limit_bytes = limit_bytes
        self._residencies = residencies
        self._changed = changed
        self._turns = turns
        self._offload = offload
        #: Threads that wait for room on the device.
        self._waiting: set[int] = set()

    def bring(self, wanted: Residency, up: Callable[[Residency], bool]) -> bool:
        """Reserve room and call `up`; once more, with idle contexts offloaded, if memory runs out.

        Budgets are declared or measured, so what torch's allocator finds may be less.

        Returns
        -------
        bool
            What `up` returns: whether the loader was called.
        """
        self.make_room(wanted)
        tried = self._try(wanted, up)
        # Outside the except clause, whose traceback would keep the half-built object and its
        # memory alive.
        return up(wanted) if tried is None else tried

    def _try(self, wanted: Residency, up: Callable[[Residency], bool]) -> bool | None:
        """Call `up`; None if it ran out of memory and idle contexts were offloaded for it."""
        try:
            return up(wanted)
        except BaseException as cause:
            if not is_out_of_memory(cause) or not self.offload_idle():
                raise
            logger.warning(
                "Out of device memory for context %r: idle contexts were offloaded; trying again",
                wanted.ref.name,
            )
            return None

    def make_room(self, wanted: Residency) -> None:
        """Reserve the device for `wanted`; offload idle contexts until it fits.

        Raises
        ------
        DeviceMemoryError
            If the context alone exceeds the budget.
        DeviceBusyError
            If every thread that holds a context there waits for room as well.
        """
        budget = self._limit_bytes()
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
                    # Reserved under the same lock as the sum: two loads never count on one gap.
                    wanted.has_room = True
                    return
                idle = [r for r in there if r.tier is Tier.DEVICE and not r.n_holders]
                if not idle:
                    self._wait_for_room(wanted, there, budget)
            if idle:
                # Without the lock: copying weights takes seconds. If the context is acquired in
                # between, offload() refuses and the loop looks again.
                self._offload(min(idle, key=lambda r: r.used_at).ref.digest)

    def measure(self, residency: Residency) -> None:
        """Correct what a context takes, now that it is on the device; make room for the rest.

        Raises
        ------
        DeviceMemoryError, DeviceBusyError
            See ``make_room``.
        """
        assert residency.live is not None
        inner = [r.live for r in residency.inner if r.live is not None]
        found = residency.live.bytes_beside(inner)
        if found > residency.n_bytes:
            residency.n_bytes = found
            self.make_room(residency)

    def offload_idle(self) -> bool:
        """Offload every context that no task holds; False if there was none."""
        with self._changed:
            digests = [d for d, r in self._residencies.items() if r.tier is Tier.DEVICE]
        return sum(map(self._offload, digests)) > 0

    def validate(self) -> None:
        """Raise AssertionError if contexts take more than the budget; with the lock held."""
        budget = self._limit_bytes()
        there = sum(r.n_bytes for r in self._residencies.values() if r.is_there)
        assert budget is None or there <= budget, (there, budget)

    def _wait_for_room(self, wanted: Residency, there: list[Residency], budget: int) -> None:
        """Wait for a change; with the lock held. Refuse if no holder can ever make room."""
        me = threading.get_ident()
        holders = {thread for residency in there for thread in residency.holding}
        if all(self._turns.leads_to(thread, self._waiting | {me}) for thread in holders):
            names = ", ".join(f"{r.ref.name!r} ({r.n_bytes:,})" for r in there)
            raise DeviceBusyError(
                f"Context {wanted.ref.name!r} takes {wanted.n_bytes:,} bytes; the device has"
                f" {budget:,} for contexts, and the tasks that hold {names} wait for room as well."
                " Acquire contexts that are used together in one call, so that the gate sees both."
            )
        self._waiting.add(me)
        try:
            self._changed.wait(_POLL_S)
        finally:
            self._waiting.discard(me)
