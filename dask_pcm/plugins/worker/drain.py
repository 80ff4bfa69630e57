"""On a preemption notice, a worker drains: it finishes its tasks and hands over its results.

It works on until its tasks have ended or the grace period is nearly over; units begin no batch that
would not end by then. Then its results in memory go to peers, and it unregisters before it is
killed, so that its loss makes no task a suspect.

Everything here runs on the worker's event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Protocol

import psutil
from distributed import Worker
from distributed.core import Status
from distributed.worker_state_machine import FreeKeysEvent, TaskState

from dask_pcm.plugins.worker.lanes import is_on_lane

logger = logging.getLogger(__name__)

#: Time reserved for handing over results: in seconds, and as a share of the grace period; the
#: smaller one counts.
_MARGIN_S, _MARGIN = 5.0, 0.2
#: The lanes count as empty after this long; then the gate is asked whether it has more.
_IDLE_S = 0.5
#: How long the gate has to answer.
_ANSWER_S = 2.0
#: Interval between checks; and how long the last messages need to be sent.
_LOOK_S, _FAREWELL_S = 0.05, 0.05
_UNBEGUN = frozenset({"waiting", "ready", "constrained"})


class Open(Protocol):
    """What a worker does beside its tasks."""

    @property
    def is_busy(self) -> bool:
        """Whether it has something left to do."""

    def move(self) -> None:
        """Have what is left done elsewhere."""


class Drain:
    """Drains a worker, at most once.

    Parameters
    ----------
    worker
        The worker to drain.
    tell
        Sends a message to the scheduler.
    questions
        Returns the questions that are answered here.

    Attributes
    ----------
    stops_at
        When work has to have ended here, by the monotonic clock; infinity without a notice.
    """

    stops_at = math.inf

    def __init__(
        self,
        worker: Worker,
        tell: Callable[[dict[str, Any]], None],
        questions: Callable[[], Open],
    ) -> None:
        self._worker = worker
        self._send = tell
        self._questions = questions
        self._ends_at = math.inf
        self._margin = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether the worker drains or has drained."""
        return self._task is not None

    def begin(self, seconds: float, is_preempted: bool = True) -> None:
        """Start to drain, to be done within `seconds`; the second time only an earlier end counts.

        Unless it `is_preempted`, nothing more begins here.
        """
        now = time.monotonic()
        if now + seconds >= self._ends_at:
            return
        self._ends_at = now + seconds
        self._margin = min(_MARGIN_S, _MARGIN * seconds)
        self.stops_at = min(self.stops_at, self._stop() if is_preempted else now)
        if is_preempted:
            logger.warning("Worker %s ends in %.0f s and drains", self._worker.address, seconds)
        left = max(0.0, self.stops_at - now)
        self._send({"op": "pcm-notice", "seconds": left, "is_preempted": is_preempted})
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._leave())

    def _stop(self) -> float:
        """When tasks have to have ended, by the monotonic clock."""
        return self._ends_at - self._margin

    async def _leave(self) -> None:
        """Drain: finish tasks, hand back those not begun, hand over results, end the process."""
        worker = self._worker
        # So that the nanny does not start another process when this one ends.
        await self._ask_nanny("close_gracefully", self._margin, reason="notice")
        # The gate still sends units that it expects to finish in time, as they are cut.
        await _until(self._is_idle, self._stop, _IDLE_S)
        while time.monotonic() < self.stops_at and await self._may_get_more():
            await _until(self._is_idle, self._stop, _IDLE_S)
        if worker.status not in (Status.running, Status.paused, Status.closing_gracefully):
            return  # closed by another request meanwhile
        # From now on no task begins here, and plain Dask sends none. Not Status.paused: the memory
        # monitor would resume the worker.
        worker.status = Status.closing_gracefully
        give_back(worker, [key for key, ts in worker.state.tasks.items() if is_unbegun(ts)])
        self._questions().move()  # their answers go on where they can
        # A batch that takes a little longer than the last one is worth waiting for.
        late = lambda: self._stop() + self._margin / 4  # noqa: E731
        await _until(lambda: not worker.state.all_running_tasks, late)
        await asyncio.sleep(_FAREWELL_S)  # lets the batched stream send the last results
        await self._hand_over(self._ends_at - self._margin / 2 - time.monotonic())
        left = max(self._margin / 2, self._ends_at - time.monotonic())
        if await self._ask_nanny("pcm_end", self._margin, seconds=left) is None:
            # Without a nanny. Tasks that still run are lost in any case: do not wait for them.
            await worker.close(executor_wait=False, timeout=left, reason="notice")

    async def _may_get_more(self) -> bool:
        """Ask the gate whether it may send more work; no, if it does not answer."""
        worker = self._worker
        asked = worker.scheduler.pcm_more(worker=worker.address)
        try:
            return await asyncio.wait_for(asked, _ANSWER_S) is True
        except Exception:  # the scheduler is gone, or has no gate any more
            return False

    def _is_idle(self) -> bool:
        """Whether no context task runs or waits here, and no question is open."""
        return not (self._has_on_lanes() or self._questions().is_busy)

    def _has_on_lanes(self) -> bool:
        """Whether a context task runs or waits here."""
        state = self._worker.state
        here = (state.all_running_tasks, state.waiting, state.ready, state.constrained)
        return any(map(is_on_lane, itertools.chain.from_iterable(here)))

    async def _hand_over(self, seconds: float) -> None:
        """Copy results to peers and unregister from the scheduler, in at most `seconds`."""
        worker, stimulus_id = self._worker, f"pcm-leave-{time.time()}"
        about: dict[str, Any] = {"close_workers": False, "remove": True}
        try:
            retired = worker.scheduler.retire_workers(
                workers=[worker.address], **about, stimulus_id=stimulus_id
            )
            await asyncio.wait_for(retired, max(0.0, seconds))
        except Exception as error:  # also raised on the scheduler: the worker ends in any case
            logger.warning("Not all results of %s have reached a peer: %r", worker.address, error)
        # If no peer could take them, the worker is still registered. Unregister as expected, so
        # that its tasks do not become suspects.
        with suppress(Exception):
            await worker.scheduler.unregister(
                address=worker.address, expected=True, close=False, stimulus_id=stimulus_id
            )

    async def _ask_nanny(self, op: str, timeout: float, **says: Any) -> Any:
        """Call a handler of the nanny; None if there is no nanny or it does not answer."""
        if not self._worker.nanny:
            return None
        asked = getattr(self._worker.rpc(self._worker.nanny), op)(**says)
        try:
            return await asyncio.wait_for(asked, timeout)
        except Exception:  # it is shutting down, or does not have the toolkit
            return None


def is_unbegun(ts: TaskState) -> bool:
    """Whether a task was assigned to this worker and has not begun."""
    return ts.state in _UNBEGUN


def free(worker: Worker, keys: Collection[Any]) -> None:
    """Drop tasks that have not begun; once confirmed, the scheduler may run them elsewhere."""
    event = FreeKeysEvent(keys=keys, stimulus_id=f"pcm-return-{time.time()}")
    worker.handle_stimulus(event)


def give_back(worker: Worker, keys: Collection[Any]) -> None:
    """Drop tasks that have not begun and let Dask schedule them anew."""
    free(worker, keys)
    for key in keys:
        stimulus_id = f"pcm-give-back-{time.time()}"
        worker.batched_send({"op": "reschedule", "key": key, "stimulus_id": stimulus_id})


async def _until(
    is_over: Callable[[], bool], stop: Callable[[], float], lasting_s: float = 0.0
) -> None:
    """Wait until `is_over` has held for `lasting_s`, or until `stop`, which may come nearer."""
    since: float | None = None
    while (now := time.monotonic()) < stop():
        if not is_over():
            since = None
        else:
            since = since or now
            if now - since >= lasting_s:
                return
        await asyncio.sleep(_LOOK_S)


def ends_in_s(walltime_s: float | None) -> float | None:
    """Seconds until the batch system ends this worker; None if the end is not known.

    Parameters
    ----------
    walltime_s
        The job's time limit, counted from the start of ``dask worker``; None to use Slurm's
        ``SLURM_JOB_END_TIME``.
    """
    if walltime_s is not None:
        return max(0.0, _started_at() + walltime_s - time.time())
    try:
        return max(0.0, int(os.environ["SLURM_JOB_END_TIME"]) - time.time())
    except (KeyError, ValueError):
        return None


def _started_at() -> float:
    """When ``dask worker`` was started: the start of the nanny's process, if there is a nanny.

    This process may be younger: the nanny replaces workers, perhaps through a fork server.
    """
    parent = multiprocessing.parent_process()
    try:
        started: float = psutil.Process(parent.pid if parent else None).create_time()
    except psutil.Error:
        started = psutil.Process().create_time()
    return started
