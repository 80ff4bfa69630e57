"""Lanes of a simulated worker: one unit is read or committed while another infers."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dask_pcm.simulation.policies.window import SimulatedUnit
from dask_pcm.simulation.world.record import WORK
from dask_pcm.simulation.world.world import Worker, World


@dataclass(slots=True, eq=False)
class _Task:
    """A unit on this worker, and when its inference began and ended."""

    unit: SimulatedUnit
    is_on_lane: bool = False
    began_s: float | None = None  # to infer
    ended_s: float | None = None


class Lanes:
    """Units of one worker, in order of arrival.

    Each takes a lane, is read, waits for the device, infers and is committed; then the scheduler
    gets a message. Reading and committing take half of ``unit_s`` each.
    """

    def __init__(
        self,
        world: World,
        worker: Worker,
        n_lanes: int,
        ended: Callable[[Worker, SimulatedUnit, float], object],
    ) -> None:
        self._world = world
        self.worker = worker
        self._n_lanes = n_lanes
        self._ended = ended
        self._tasks: list[_Task] = []
        self._ready: deque[_Task] = deque()
        self._is_busy = False
        self._half_s = world.scenario.overheads.unit_s / 2

    def send(self, unit: SimulatedUnit) -> None:
        """The scheduler has sent a unit; it arrives after the message delay."""
        self._tasks.append(_Task(unit))
        message_s = self._world.scenario.overheads.message_s
        self._world.later(self.worker, message_s, self._fill)

    def hand_back(self) -> list[SimulatedUnit]:
        """Remove and return the units that are on no lane yet."""
        back = [task.unit for task in self._tasks if not task.is_on_lane]
        self._tasks = [task for task in self._tasks if task.is_on_lane]
        return back

    def lose(self, is_journalled: bool) -> list[tuple[SimulatedUnit, int]]:
        """The worker has left; return its units, each with its number of journalled rows."""
        now, lost = self._world.clock.now, []
        for task in self._tasks:
            unit, n_kept = task.unit, 0
            if task.began_s is not None:
                seconds = (task.ended_s or now) - task.began_s
                self._world.record.span(self.worker.name, WORK, task.began_s, now)
                n_ended, n_begun = self._world.rows_by(self.worker, unit.run, unit.n_rows, seconds)
                n_kept = n_ended if is_journalled else 0
                kept_s = self._world.infer_s(self.worker, unit.run, n_kept)
                self._world.record.lost(n_begun - n_kept, max(0.0, seconds - kept_s))
            lost.append((unit, n_kept))
        self._tasks.clear()
        return lost

    def _fill(self) -> None:
        n_free = self._n_lanes - sum(task.is_on_lane for task in self._tasks)
        for task in [task for task in self._tasks if not task.is_on_lane][:n_free]:
            task.is_on_lane = True
            self._world.later(self.worker, self._half_s, functools.partial(self._read, task))

    def _read(self, task: _Task) -> None:
        self._ready.append(task)
        self._infer()

    def _infer(self) -> None:
        """Start the next unit on the device, if that is free."""
        if self._is_busy or not self._ready:
            return
        self._is_busy = True
        task = self._ready.popleft()
        task.began_s = self._world.clock.now
        self._world.record.began(self.worker.name, task.began_s)
        seconds = self._world.infer_s(self.worker, task.unit.run, task.unit.n_rows)
        self._world.later(self.worker, seconds, lambda: self._commit(task, seconds))

    def _commit(self, task: _Task, seconds: float) -> None:
        now = task.ended_s = self._world.clock.now
        self._world.record.span(self.worker.name, WORK, now - seconds, now)
        self._is_busy = False
        self._infer()
        message_s = self._world.scenario.overheads.message_s
        self._world.later(self.worker, self._half_s + message_s, lambda: self._end(task, seconds))

    def _end(self, task: _Task, seconds: float) -> None:
        self._tasks.remove(task)
        self._fill()
        self._ended(self.worker, task.unit, seconds)
