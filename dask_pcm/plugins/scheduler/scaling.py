"""A cluster's ``adapt()`` gets the larger of two targets: Dask's own and the gate's.

Dask's target counts the tasks that the scheduler holds. Of a run these are only a window of units,
and tasks on lanes do not count as occupying a worker. The gate knows all remaining work of a run,
so it answers as well. Plain work is counted as in plain Dask.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Scheduler
from distributed.metrics import monotonic
from distributed.scheduler import WorkerState

from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.scheduling.rules.placement import may_get_more
from dask_pcm.scheduling.rules.scaling import n_workers_wanted, needed_workers


class Scaling(Service):
    """Tells clusters how many workers to run, and which of them may be retired."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._undo = answer_adaptive(hub.scheduler, lambda seconds: self.n_wanted(seconds))

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """See ``Service``."""
        return {"pcm_more": self.may_get_more}

    async def may_get_more(self, worker: str) -> bool:
        """Whether a draining worker without work should wait for more; asked by the worker."""
        view = self._hub.state.workers.get(worker)
        return view is not None and may_get_more(self._hub.state, view, monotonic())

    def n_wanted(self, target_s: float) -> int:
        """The number of workers that would finish the work at the gate within `target_s`."""
        return n_workers_wanted(self._hub.state, target_s)

    def removable(self, workers: list[WorkerState]) -> list[WorkerState]:
        """The workers among `workers` that the work at the gate does not need."""
        needed = needed_workers(self._hub.state, (ws.address for ws in workers))
        return [ws for ws in workers if ws.address not in needed]

    def uninstall(self) -> None:
        """See ``Service``."""
        self._undo()


def answer_adaptive(scheduler: Scheduler, n_wanted: Callable[[float], int]) -> Callable[[], None]:
    """Raise ``adaptive_target`` to at least `n_wanted`; return a function that undoes it.

    Parameters
    ----------
    n_wanted
        Called with the target duration in seconds.
    """
    asked = scheduler.adaptive_target

    def adaptive_target(target_duration: float | str | None = None) -> int:
        duration = target_duration
        if duration is None:
            duration = dask.config.get("distributed.adaptive.target-duration")
        return max(asked(target_duration), n_wanted(parse_timedelta(duration)))

    def undo() -> None:
        # A wrapper that another plugin has installed since stays in place.
        if scheduler.adaptive_target is adaptive_target:
            scheduler.adaptive_target = asked
        if scheduler.handlers.get("adaptive_target") is adaptive_target:
            scheduler.handlers["adaptive_target"] = asked

    # Both: dashboards and operators call the method, cluster objects the handler.
    scheduler.adaptive_target = adaptive_target
    scheduler.handlers["adaptive_target"] = adaptive_target
    return undo
