"""How a context comes to the device: restored, reattached or built; and how a load that fails ends.

A load has begun when this is called: the context's tier is ``LOADING``, and other threads wait.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

from dask_pcm.errors import DeviceBusyError, LoadError
from dask_pcm.ladder.budget import DeviceBudget, Request
from dask_pcm.ladder.build import Builder, failure_kind, failure_text
from dask_pcm.ladder.lending import Lending
from dask_pcm.ladder.objects.live import Live
from dask_pcm.ladder.objects.tensors import is_out_of_memory, is_sticky
from dask_pcm.ladder.residencies import Residencies
from dask_pcm.ladder.residency import Attendant, Borrowing, Change, Residency, Stopping
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)


class Loads:
    """Brings contexts to the device and reports how each load has ended; for any thread."""

    def __init__(self, residencies: Residencies, device: DeviceBudget, builder: Builder) -> None:
        self._residencies = residencies
        self._device = device
        self._builder = builder
        #: Where attendants borrow memory.
        self.lending: Lending | None = None

    def bring(self, residency: Residency) -> Any:
        """Bring a context whose move has begun to the device; report and return the live object."""
        start = time.monotonic()
        error, is_built, wrong = None, False, None
        is_up = False
        try:
            is_built = self._onto_device(residency)
            is_up = True
            self._measure(residency)
            self._attend(residency)
        except DeviceBusyError as cause:  # not the recipe's fault: no FAILED, no back-off
            self._step_back(residency, is_up)
            raise LoadError(failure_text(residency.ref, cause)) from cause
        except BaseException as cause:  # SystemExit too: a library that exits is a failed load
            error, wrong = failure_text(residency.ref, cause), cause
            # What it needs goes away as the process ends; that is nothing to worry about.
            is_ending = self._residencies.is_ending or isinstance(cause, KeyboardInterrupt)
            logger.log(logging.DEBUG if is_ending else logging.WARNING, "%s", error)
            self._residencies.give_up(residency)
        seconds = time.monotonic() - start
        with self._residencies.changed:
            residency.end_load(error, is_built, seconds)
            self._residencies.changed.notify_all()
        self._residencies.report(
            Change(
                residency.ref.digest,
                residency.tier,
                seconds,
                error,
                is_built,
                residency.full_bytes,
                failure_kind(wrong),
                is_sticky(wrong),
                self._builder.staged_s.get(residency.ref.digest, 0.0) if is_built else 0.0,
                residency.attendant.n_rows if residency.attendant is not None else 0,
            )
        )
        if isinstance(wrong, KeyboardInterrupt):  # the user's, not of a loader
            raise wrong
        if error:
            raise LoadError(error)
        live = residency.live
        value = residency.value
        if is_built and live is not None:
            self._keep(residency, live)
        if residency.is_released:  # during the load; does nothing if a task holds it by now
            self._residencies.evict(residency.ref.digest)
        return value

    def _onto_device(self, residency: Residency) -> bool:
        """Reserve room and bring a context there; once more, with idle ones offloaded, if memory
        runs out. True if its loader was called.

        Budgets are declared or measured, so what torch's allocator finds may be less.
        """
        with self._residencies.changed:
            residency.waits_for_room = residency.live is not None
            self._residencies.changed.notify_all()
        try:
            self._reserve(residency, residency.n_bytes)
        finally:
            with self._residencies.changed:
                residency.waits_for_room = False
                self._residencies.changed.wait_for(lambda: not residency.is_relocated)
        tried = self._try(residency)
        # Outside the except clause, whose traceback would keep the half-built object and its
        # memory alive.
        return self._up(residency) if tried is None else tried

    def _try(self, residency: Residency) -> bool | None:
        """Bring a context; None if memory ran out and idle contexts were offloaded for it."""
        try:
            return self._up(residency)
        except BaseException as cause:
            if not is_out_of_memory(cause) or not self._device.reclaim():
                raise
            logger.warning(
                "Out of device memory for context %r: idle contexts were offloaded; trying again",
                residency.ref.name,
            )
            return None

    def _reserve(self, residency: Residency, n_bytes: int, attendant_bytes: int = 0) -> None:
        """Make room for a context, and for its attendant; see ``DeviceBudget.reserve``."""
        counted = residency.taken_bytes if residency.is_there else 0

        def grant() -> None:
            residency.has_room = True
            residency.n_bytes, residency.attendant_bytes = n_bytes, attendant_bytes

        request = Request(residency.ref.name, n_bytes + attendant_bytes, counted)
        self._device.reserve(request, grant)

    def _measure(self, residency: Residency) -> None:
        """Correct what a context takes, now that it is on the device; make room for the rest."""
        assert residency.live is not None
        inner = [r.live for r in residency.inner if r.live is not None]
        found = residency.live.bytes_beside(inner)
        if found > residency.n_bytes:
            with self._residencies.changed:
                residency.n_bytes = found  # it has them, even if there is no room and it must go
            self._reserve(residency, found)

    def _attend(self, residency: Residency) -> None:
        """Start the attendant of an object that has one, within the budget."""
        if getattr(residency.value, "is_attended", False) is not True:
            return
        if self.lending is not None:  # its size depends on what is free
            self.lending.leases.reclaim_device()
        attendant: Attendant = residency.value.attend()
        if self.lending is not None and isinstance(attendant, Borrowing):
            attendant.lend(self.lending.borrow)
        residency.attendant_size = attendant.n_bytes
        # Before it starts: what it takes then must not come on top of a full device.
        self._reserve(residency, residency.n_bytes, attendant.n_bytes)
        if isinstance(attendant, Stopping):
            attendant.on_stopped(functools.partial(self._residencies.stopped, residency, attendant))
        residency.attendant = attendant  # closed with the residency, also if it does not start
        attendant.start()

    def _up(self, residency: Residency) -> bool:
        """Restore, reattach or build a context; True if its loader was called."""
        if residency.live is not None:
            residency.live.restore()
            return False
        residency.live = self._builder.found(residency.ref, residency.files)
        if residency.live is not None:
            return False
        with self._residencies.building(residency):
            residency.live = self._builder.built(residency.ref, residency.files)
        return True

    def _step_back(self, residency: Residency, is_up: bool) -> None:
        """Abandon a load for which there is no room: back to the host tier, or drop the context."""
        self._residencies.dismiss(residency)
        is_lower = residency.live is not None and not is_up
        if is_lower or self._residencies.is_lowered(residency):
            self._residencies.end_move(residency, Tier.HOST)
            return
        self._residencies.drop(residency)

    def _keep(self, residency: Residency, live: Live) -> None:
        """Copy a newly built context to the host tier; tasks use it meanwhile."""
        with self._residencies.changed:
            is_over = self._residencies.is_closed or residency.is_released
            if is_over or residency.tier is not Tier.DEVICE or residency.live is not live:
                return
            self._residencies.take(
                residency
            )  # so that it is not evicted while its tensors are copied
        try:
            self._builder.keep(residency.ref, live)
        finally:
            self._residencies.let_go(residency)
