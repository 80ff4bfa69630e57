"""A worker takes part once its plugin has greeted the gate, with an epoch that fences messages."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dask_pcm.plugins.delivery import PATIENCE_S
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.scheduling.events import WorkerDraining, WorkerJoined, WorkerLeft, WorkerPaused
from dask_pcm.scheduling.rules.warming import n_threads


class Workers(Service):
    """Keeps the members and sends them messages.

    Attributes
    ----------
    members
        Workers whose plugin has greeted the gate, by address.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.members: dict[str, Member] = {}
        #: Number of workers that share a host and its cores.
        self._n_on: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """See ``Service``."""
        return {"pcm-notice": self.on_notice}

    def on_hello(
        self,
        worker: str,
        epoch: str,
        n_lanes: int,
        cores: Iterable[int],
        device_bytes: int | None = None,
        device: str = "",
        pool: str = "",
        ends_in_s: float | None = None,
        **kwargs: Any,
    ) -> None:
        """A worker's plugin greets the gate; without effect if its epoch is known already."""
        # The message may arrive after the worker's removal: Dask then has no state of it.
        ws, known = self._hub.scheduler.workers.get(worker), self.members.get(worker)
        if ws is None or (known is not None and known.epoch == epoch):
            return
        member = self.members[worker] = Member(epoch, tuple(cores), ws)
        if known is not None:
            self._n_on[known.host, known.cores] -= 1
        self._n_on[member.host, member.cores] += 1
        lasts_s = math.inf if ends_in_s is None else ends_in_s
        joined = WorkerJoined(worker, n_lanes, device_bytes, ws.host, device, pool, lasts_s)
        self._hub.apply(joined)
        for service in self._hub.services:
            service.worker_joined(worker, member)

    def remove_worker(self, worker: str, is_lost: bool) -> None:
        """Remove a worker; Dask has moved its tasks already."""
        member = self.members.pop(worker, None)
        if member is None:
            return
        self._n_on[member.host, member.cores] -= 1
        for service in self._hub.services:  # before the event: they need the state's worker
            service.worker_left(worker, member, is_lost)
        self._hub.apply(WorkerLeft(worker, is_lost))

    def on_notice(self, worker: str, seconds: float, is_preempted: bool = True) -> None:
        """A worker drains: reschedule the tasks that it has not begun."""
        self._hub.apply(WorkerDraining(worker, seconds, is_preempted))
        self.call_back(worker, list(self._hub.state.workers[worker].running))

    def is_current(self, worker: str, epoch: str) -> bool:
        """Whether `epoch` is the current one of a worker."""
        member = self.members.get(worker)
        return member is not None and member.epoch == epoch

    def tell(self, worker: str, message: Mapping[str, Any]) -> None:
        """Send a message to a worker's plugin; dropped if the worker is gone."""
        member = self.members.get(worker)
        if member is not None:
            self._hub.scheduler.worker_send(worker, {**message, "epoch": member.epoch})

    def call_back(self, worker: str, keys: list[Any]) -> None:
        """Ask a worker to hand back tasks that it has not begun.

        The scheduler cannot free them by itself: one that begins meanwhile would run twice.
        """
        self.tell(worker, {"op": "pcm-return", "keys": keys})

    async def tell_nannies(self, *messages: dict[str, Any]) -> None:
        """Send messages to all nannies; do not wait for those that take too long to answer."""
        told = (
            self._hub.scheduler.broadcast(msg=message, nanny=True, on_error="ignore")
            for message in messages
        )
        telling = [asyncio.ensure_future(one) for one in told]
        if telling:
            await asyncio.wait(telling, timeout=PATIENCE_S)

    def n_threads(self, worker: str) -> int:
        """The number of CPU threads that a context may use on a worker."""
        member = self.members[worker]
        n_neighbors = self._n_on[member.host, member.cores]
        return self._hub.config.n_threads or n_threads(len(member.cores), n_neighbors)

    def restarted(self) -> None:
        """See ``Service``; nannies drop the images of contexts."""
        # A restart is meant to get rid of state: new processes must not find the old weights.
        asyncio.get_running_loop().create_task(self.tell_nannies({"op": "pcm_clear"}))

    def tick(self) -> None:
        """See ``Service``."""
        self.sync_pauses()

    def sync_pauses(self) -> None:
        """Follow Dask's pauses, for which there is no hook; reschedule what has not begun there."""
        scheduler = self._hub.scheduler
        for address, view in self._hub.state.workers.items():
            is_paused = scheduler.workers.get(address) not in scheduler.running
            if is_paused != view.is_paused:
                self._hub.apply(WorkerPaused(address, is_paused))
                if is_paused and view.running:
                    self.call_back(address, list(view.running))

    def uninstall(self) -> None:
        """See ``Service``."""
        self.members.clear()  # makes all later messages of workers stale
