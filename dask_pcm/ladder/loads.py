"""How a context comes to the device: restored, reattached or built; and how a load that fails ends.

A load has begun when this is called: the context's tier is ``LOADING``, and other threads wait.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from dask_pcm.errors import DeviceBusyError, LoadError
from dask_pcm.ladder.budget import DeviceBudget
from dask_pcm.ladder.build import Builder, failure_kind, failure_text
from dask_pcm.ladder.objects.live import Live
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.ladder.residencies import Residencies
from dask_pcm.ladder.residency import Change, Residency
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)


class Loads:
    """Brings contexts to the device and reports how each load has ended; for any thread."""

    def __init__(self, residencies: Residencies, device: DeviceBudget, builder: Builder) -> None:
        self._residencies = residencies
        self._device = device
        self._builder = builder

    def bring(self, residency: Residency) -> Any:
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
            self._residencies.evict(residency.ref.digest)
        return value

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
        live = residency.live
        try:
            if live is not None and (not is_up or (not residency.inner and live.offload())):
                self._residencies.end_move(residency, Tier.HOST)
                return
        except Exception as error:
            logger.warning(
                "Context %r cannot be offloaded, so it is dropped: %r", residency.ref.name, error
            )
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
