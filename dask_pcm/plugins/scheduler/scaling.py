"""What a cluster's ``adapt()`` is told: the larger of Dask's own count of workers and the gate's.

Dask counts the tasks that the scheduler holds. Of a run these are a window of some units, however
much is still to come, and those that are at work on lanes are set apart. So the gate, which knows
the rest, answers as well. Plain work is counted as ever.
"""

from __future__ import annotations

from collections.abc import Callable

import dask
from dask.utils import parse_timedelta
from distributed import Scheduler
from distributed.scheduler import WorkerState

from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.scheduling.rules.scaling import n_workers_wanted, needed_workers


class Scaling(Service):
    """Tells clusters how many workers are worth having, and which they may stop."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._undo = answer_adaptive(hub.scheduler, lambda seconds: self.n_wanted(seconds))

    def n_wanted(self, target_s: float) -> int:
        """Workers that would finish the work at the gate within `target_s`."""
        return n_workers_wanted(self._hub.state, target_s)

    def removable(self, workers: list[WorkerState]) -> list[WorkerState]:
        """Those of the workers that the work at the gate does not need."""
        needed = needed_workers(self._hub.state, (ws.address for ws in workers))
        return [ws for ws in workers if ws.address not in needed]

    def uninstall(self) -> None:
        self._undo()


def answer_adaptive(scheduler: Scheduler, n_wanted: Callable[[float], int]) -> Callable[[], None]:
    """Have ``adaptive_target`` answer with `n_wanted` too; return what undoes it.

    Parameters
    ----------
    n_wanted
        Called with the seconds within which work is to be done.
    """
    asked = scheduler.adaptive_target

    def adaptive_target(target_duration: float | str | None = None) -> int:
        duration = target_duration
        if duration is None:
            duration = dask.config.get("distributed.adaptive.target-duration")
        return max(asked(target_duration), n_wanted(parse_timedelta(duration)))

    def undo() -> None:
        # Where another plugin has put its own in front since, that one stays.
        if scheduler.adaptive_target is adaptive_target:
            scheduler.adaptive_target = asked
        if scheduler.handlers.get("adaptive_target") is adaptive_target:
            scheduler.handlers["adaptive_target"] = asked

    # Dashboards and operators ask the method, clusters the handler.
    scheduler.adaptive_target = adaptive_target
    scheduler.handlers["adaptive_target"] = adaptive_target
    return undo
