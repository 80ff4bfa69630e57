"""Plans which contexts go on which hosts, on a thread; the policy reads the last plan."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from distributed.metrics import monotonic

from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.scheduling.events import HostPlan, HostsPlanned, MemoryNeeded
from dask_pcm.scheduling.rules.placer import Placeable, place, to_place

logger = logging.getLogger(__name__)

#: Between two plans, in seconds; a plan may take as long.
_INTERVAL_S = 10.0


class Placing(Service):
    """Hears what memory contexts need, and has the placer plan when that or the hosts change."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pcm-placer")
        #: What was to be placed by the last plan.
        self._planned: tuple[Sequence[Placeable], Mapping[str, int]] | None = None
        self._number = 0
        self._next_at = 0.0
        self._is_over = False

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """See ``Service``."""
        return {"pcm-needs": self.on_needs}

    def on_needs(self, worker: str, digest: str, n_bytes: int, **kwargs: Any) -> None:
        """A worker needs more memory for a context than its device has."""
        self._hub.apply(MemoryNeeded(digest, n_bytes))

    def tick(self) -> None:
        """See ``Service``; begins a plan if something has changed since the last one."""
        if self._is_over or monotonic() < self._next_at:
            return
        wanted = to_place(self._hub.state)
        if wanted == self._planned:
            return
        self._planned, self._next_at = wanted, monotonic() + _INTERVAL_S
        self._number += 1
        if wanted is None:
            self._hub.apply(HostsPlanned(None))
            return
        planning = self._thread.submit(place, *wanted, _INTERVAL_S)
        planning.add_done_callback(functools.partial(self._on_plan, self._number))

    def close(self) -> None:
        """See ``Service``."""
        self._is_over = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _on_plan(self, number: int, planned: Future[HostPlan | None]) -> None:
        """A plan was made; on its thread."""
        if planned.cancelled() or self._is_over:
            return
        if (error := planned.exception()) is not None:
            logger.warning("No plan of which contexts go on which hosts: %r", error)
            return
        if planned.result() is None:
            logger.info("No plan of which contexts go on which hosts was found in time")
        self._loop.call_soon_threadsafe(self._take, number, planned.result())

    def _take(self, number: int, plan: HostPlan | None) -> None:
        if not self._is_over and number == self._number:  # else there is a later one
            self._hub.apply(HostsPlanned(plan))
