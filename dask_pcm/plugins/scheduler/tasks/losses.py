"""Tasks that were lost with their worker are parked again once the loss is attributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from distributed.scheduler import KilledWorker, TaskState, WorkerState

from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.plugins.scheduler.tasks.attribution import Attribution
from dask_pcm.plugins.scheduler.tasks.dispatch import end_with
from dask_pcm.plugins.scheduler.tasks.parked import ParkedTasks
from dask_pcm.scheduling.events import ProcessEnded
from dask_pcm.scheduling.state.worker import Whereabouts, select_begun


class Losses(Service):
    """Handles tasks that are lost with their worker.

    A task that had begun there and was lost before waits until the loss is attributed (see
    ``attribution.py``). Then it is parked again, isolated if it is a suspect, or ends with
    ``KilledWorker``. A first loss parks the task at once.
    """

    def __init__(self, hub: Hub, parked: ParkedTasks, attribution: Attribution) -> None:
        self._hub = hub
        self._parked = parked
        self._attribution = attribution
        attribution.on_judged = self._on_judged
        attribution.on_loads_blamed = lambda *loads: hub.apply(ProcessEnded(*loads))
        #: Tasks of a worker that is being removed: Dask moves them before it calls the hook.
        self._lost_with: dict[str, dict[Any, Whereabouts]] = {}
        self._last_lost: WorkerState | None = None
        #: How many worker processes lost their device in a task.
        self._n_lost_devices: Counter[Any] = Counter()

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """See ``Service``."""
        return {"pcm_losses": self.on_losses, "pcm_lost_device": self.on_lost_device}

    async def on_losses(self, key: Any) -> int:
        """Return how many worker losses were attributed to a task since it last asked.

        Waits until its latest loss is attributed.
        """
        return await self._attribution.ask(key)

    async def on_lost_device(self, key: Any, is_cause: bool) -> int:
        """A worker process lost its device in a task; return how many have so far."""
        self._n_lost_devices[key] += is_cause
        return self._n_lost_devices[key]

    def task_left(self, ts: TaskState) -> None:
        """A task has left its worker, perhaps because the worker is gone."""
        worker = self._hub.state.placed.get(ts.key)
        if ts.suspicious and worker is not None and worker not in self._hub.scheduler.workers:
            # Now: once all of its work has left, the worker's view knows nothing of it.
            view = self._hub.state.workers.get(worker)
            where = Whereabouts.ON_LANE if view is None else view.where(ts.key)
            self._lost_with.setdefault(worker, {})[ts.key] = where
            ts.suspicious = 0  # Dask counts the loss against every task of the worker

    def worker_joined(self, worker: str, member: Member) -> None:
        """See ``Service``; a nanny that starts a worker has outlived the one before."""
        self._attribution.joined(member.ws.nanny or "", worker, member.ws.host)

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        """See ``Service``; hands the tasks and loads that had begun there to the attribution."""
        lost_with = self._lost_with.pop(worker, {})
        view = self._hub.state.workers.get(worker)
        # What a notice has ended is no fault of what was being loaded.
        loads = sorted(view.begun) if view and not view.is_draining else []
        if not (lost_with or loads):
            return
        tasks = self._hub.scheduler.tasks
        found = [ts for key in lost_with if (ts := tasks.get(key)) is not None]
        priorities = {ts.key: tuple(ts.priority or ()) for ts in found}
        works = {ts.key: lost_with[ts.key] for ts in found}
        keys = select_begun(works, priorities, view.n_lanes) if view else list(priorities)
        self._last_lost = member.ws.clean()
        self._attribution.lost(member.ws.nanny or "", keys, member.ws.host, loads)
        for key in keys:
            ts = tasks[key]
            lost = {"pcm_lost": self._attribution.n_lost[key]}  # the next attempt reads it
            ts.annotations = {**(ts.annotations or {}), **lost}
            if self.is_open(key):
                self._parked.withdraw(key)

    def restarted(self) -> None:
        """See ``Service``."""
        self._attribution.restarted()

    def is_open(self, key: Any) -> bool:
        """Whether a task has to wait until its latest loss is attributed."""
        return self._attribution.is_open(key)

    def _on_judged(self, keys: Iterable[Any]) -> None:
        """A loss is attributed: park its tasks, or end those with too many losses."""
        allowed = self._hub.scheduler.allowed_failures
        for key in self._hub.states_of(keys, "no-worker"):
            if key not in self._parked.asked or self.is_open(key):  # lost again since
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
        """See ``Service``."""
        self._attribution.close()
