"""Workers that are lost: which tasks had begun there, and how these go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from distributed.scheduler import KilledWorker, TaskState, WorkerState

from dask_pcm.plugins.scheduler.attribution import Attribution
from dask_pcm.plugins.scheduler.dispatch import end_with
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.plugins.scheduler.parked import ParkedTasks
from dask_pcm.plugins.scheduler.service import Service


class Losses(Service):
    """Tasks that are lost with their worker.

    A task that had begun there waits until it is clear who is to blame (see ``attribution.py``) if
    it was lost before; then it is parked again, isolated if it is a suspect, or ends.
    """

    def __init__(self, hub: Hub, parked: ParkedTasks, attribution: Attribution) -> None:
        self._hub = hub
        self._parked = parked
        self._attribution = attribution
        attribution.on_judged = self._on_judged
        #: Tasks that a worker had which is about to be removed unasked.
        self._lost_with: dict[str, list[Any]] = {}
        self._last_lost: WorkerState | None = None
        #: How many worker processes have lost their device with a task.
        self._n_lost_devices: Counter[Any] = Counter()

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return {"pcm_losses": self.on_losses, "pcm_lost_device": self.on_lost_device}

    async def on_losses(self, key: Any) -> int:
        """How many processes a task has cost since it last asked.

        Waits until it is clear what its last loss means.
        """
        return await self._attribution.ask(key)

    async def on_lost_device(self, key: Any, is_cause: bool) -> int:
        """A worker process loses its device in a task; returns how often that has been so."""
        self._n_lost_devices[key] += is_cause
        return self._n_lost_devices[key]

    def task_left(self, ts: TaskState) -> None:
        """A task has left its worker, perhaps since that is gone."""
        worker = self._hub.state.placed.get(ts.key)
        if ts.suspicious and worker is not None and worker not in self._hub.scheduler.workers:
            self._lost_with.setdefault(worker, []).append(ts.key)
            ts.suspicious = 0  # Dask blames every task that was there

    def worker_joined(self, worker: str, member: Member) -> None:
        self._attribution.joined(member.ws.nanny)

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        if not (lost_with := self._lost_with.pop(worker, [])):
            return
        tasks = self._hub.scheduler.tasks
        found = [ts for key in lost_with if (ts := tasks.get(key)) is not None]
        view = self._hub.state.workers.get(worker)
        priorities = {ts.key: tuple(ts.priority or ()) for ts in found}
        keys = view.begun_of(priorities) if view else list(priorities)
        self._last_lost = member.ws.clean()
        self._attribution.lost(member.ws.nanny or "", keys)
        for key in keys:
            ts = tasks[key]
            lost = {"pcm_lost": self._attribution.n_lost[key]}  # the next attempt is told
            ts.annotations = {**(ts.annotations or {}), **lost}
            if self.is_open(key):
                self._parked.withdraw(key)

    def is_open(self, key: Any) -> bool:
        """Whether a task has to wait until it is clear who is to blame for its last loss."""
        return self._attribution.is_open(key)

    def _on_judged(self, keys: Iterable[Any]) -> None:
        """It is clear who is to blame for a loss: its tasks go on, or have cost too much."""
        allowed = self._hub.scheduler.allowed_failures
        for key in self._hub.states_of(keys, "no-worker"):
            if key not in self._parked.asked or self.is_open(key):  # there was another loss
                continue
            if self._attribution.n_blamed[key] > allowed:
                self._parked.withdraw(key)
                error = KilledWorker(key, self._last_lost, allowed)
                end_with(self._hub, self._hub.scheduler.tasks[key], error)
            else:
                self._parked.park(key)

    def forget(self, key: Any) -> None:
        """The scheduler has forgotten a task."""
        self._n_lost_devices.pop(key, None)
        self._attribution.forget(key)

    def close(self) -> None:
        self._attribution.close()
