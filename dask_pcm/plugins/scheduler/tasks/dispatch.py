"""Carries out the policy's actions, as transitions of tasks and messages to workers."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from distributed.protocol.pickle import dumps
from distributed.scheduler import TaskState

from dask_pcm.errors import LoadError
from dask_pcm.plugins.scheduler.contexts import ContextService
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.plugins.scheduler.tasks import parking
from dask_pcm.plugins.scheduler.tasks.parked import ParkedTasks
from dask_pcm.plugins.scheduler.workers import Workers
from dask_pcm.scheduling.actions import (
    Action,
    Assign,
    Fail,
    Load,
    Offload,
    Quarantine,
)
from dask_pcm.scheduling.events import WorkHandedOver, WorkRejoined

logger = logging.getLogger(__name__)

#: What the units of runs need; by name, as plugins know nothing of runs.
_OF_UNITS = ("dask_pcm.runs.units.run_unit",)


class Dispatch(Service):
    """Carries out the policy's actions.

    A task is dispatched by restricting it to its worker and recommending ``processing``.
    """

    def __init__(
        self, hub: Hub, workers: Workers, contexts: ContextService, parked: ParkedTasks
    ) -> None:
        self._hub = hub
        self._workers = workers
        self._contexts = contexts
        self._parked = parked

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """See ``Service``."""
        return {
            "pcm-returned": self.on_returned,
            "pcm-handed-over": self.on_handed_over,
            "pcm-rejoined": self.on_rejoined,
        }

    def carry_out(self, actions: list[Action]) -> None:
        """Carry out the actions of one decision, its assignments in one batch of transitions."""
        try:
            for action in actions:
                self._act(action)
        finally:  # the state already counts the assignments as placed, even after a failure here
            self._send([action for action in actions if isinstance(action, Assign)])

    def _act(self, action: Action) -> None:
        """Carry out one action that is not an assignment."""
        match action:
            case Load(worker, context):
                self._load(worker, context)
            case Offload(worker, context):
                self._workers.tell(worker, {"op": "pcm-offload", "digest": context})
            case Fail(key, error=error):
                ts = self._hub.scheduler.tasks.get(key)
                if ts is not None and ts.state == "no-worker":
                    end_with(self._hub, ts, LoadError(error))
            case Quarantine(host, seconds, error):
                logger.warning("Node %s is quarantined for %.3g s: %s", host, seconds, error)

    def _load(self, worker: str, context: str) -> None:
        """Ask a worker to load a context."""
        logger.debug("Worker %s loads %s", worker, context)
        message = {
            "op": "pcm-load",
            "ref": pickle.dumps(self._contexts.refs[context]),
            "n_threads": self._workers.n_threads(worker),
            "imports": _OF_UNITS if context in self._hub.state.ahead.runs.contexts() else (),
        }
        self._workers.tell(worker, message)

    def _send(self, assigns: list[Assign]) -> None:
        """Dispatch tasks; a task that does not arrive in ``processing`` is parked again."""
        tasks = self._hub.scheduler.tasks
        recommendations: dict[Any, str] = {}
        for assign in reversed(assigns):  # Dask takes the last recommendation first
            ts = tasks.get(assign.key)
            # The decision is a turn of the loop old: the task may have been cancelled since.
            if ts is None or ts.state != "no-worker":
                self._parked.withdraw(assign.key)
                continue
            parking.restrict(ts, {assign.worker})
            recommendations[assign.key] = "processing"
        self._hub.transition(recommendations, "dispatch")
        for key in recommendations:
            ts = tasks.get(key)
            if ts is not None and ts.state == "processing":
                self._set_apart(ts)
            elif ts is not None and ts.state == "no-worker":
                # Its worker was paused or left in between.
                parking.park(ts)
                self._workers.sync_pauses()
                self._parked.park(key)

    def _set_apart(self, ts: TaskState) -> None:
        """Keep a dispatched task from counting against its worker's threads.

        It runs on a lane, so to Dask it is marked like a task that has seceded. Otherwise a worker
        with context tasks would get no plain tasks.
        """
        ws = ts.processing_on
        if ws is not None and ts not in ws.long_running:
            ws.add_to_long_running(ts)
            self._hub.scheduler.check_idle_saturated(ws)

    def on_long_running(self, key: Any, worker: str, **message: Any) -> None:
        """A task secedes: its lane is free for the tasks that it waits for.

        Its worker still answers for it: if the worker is lost, the task may be the cause.

        Replaces Dask's handler, which expects that the task was not marked long-running before;
        ``_set_apart`` has done that already.
        """
        scheduler = self._hub.scheduler
        ts = scheduler.tasks.get(key)
        if ts is None or ts.processing_on is None or ts not in ts.processing_on.long_running:
            scheduler.handle_long_running(key=key, worker=worker, **message)
        if self._hub.state.placed.get(key) == worker:
            self._hub.apply(WorkHandedOver(key))

    def on_handed_over(
        self, worker: str, key: Any, n_rows: float | None = None, **kwargs: Any
    ) -> None:
        """A task leaves its lane: an attendant serves its last rows, or it secedes."""
        if self._hub.state.placed.get(key) == worker:
            self._hub.apply(WorkHandedOver(key, n_rows))

    def on_rejoined(self, worker: str, key: Any, **kwargs: Any) -> None:
        """A task that had seceded is on a lane again."""
        if self._hub.state.placed.get(key) == worker:
            self._hub.apply(WorkRejoined(key))

    def on_returned(self, worker: str, keys: list[Any]) -> None:
        """A worker has handed back tasks that it had not begun: schedule them anew."""
        placed = self._hub.state.placed
        returned = {key: "released" for key in keys if placed.get(key) == worker}
        self._hub.transition(returned, "returned")


def end_with(hub: Hub, ts: TaskState, error: Exception) -> None:
    """End a parked task with an error."""
    stimulus_id = hub.stimulus("failed")
    recommendations = hub.scheduler.transition(
        ts.key,
        "erred",
        stimulus_id,
        exception=dumps(error),
        exception_text=str(error),
        cause=ts.key,
    )
    hub.scheduler.transitions(recommendations, stimulus_id)
