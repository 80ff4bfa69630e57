"""Stops a ``compute`` whose function fails on every row: workers report, this service answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from distributed import Scheduler

from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.scheduling.rules.first_batches import Failing, Frames, Position


class FailingFrames(Service):
    """Collects partitions in which every row raised, by frame."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._frames = Frames(scheduler.task_groups.get)

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """See ``Service``."""
        return {"pcm_failing": self.on_failing}

    async def on_failing(
        self, frame: str, number: int, n_partitions: int, n_batches: int, kind: str
    ) -> bool:
        """Every row of a partition raised; return whether the computation should stop."""
        failing = Failing(n_batches, kind)
        return self._frames.note(Position(frame, number, n_partitions), failing)
