"""How a worker leaves when the batch system is about to end it.

It works on until what it has has ended or its time is nearly up. Then its results in memory go to
peers, and it is gone before it is killed: no task counts as one that may have killed its worker.

Everything here runs on the worker's event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import psutil
from distributed import Worker
from distributed.core import Status
from distributed.worker_state_machine import FreeKeysEvent, TaskState

from dask_pcm.plugins.worker.lanes import is_on_lane

logger = logging.getLogger(__name__)

#: What is kept of a notice for handing over: so long, or this part of it where that is less.
_MARGIN_S, _MARGIN = 5.0, 0.2
#: For so long nothing comes before it is taken for nothing more to come.
_IDLE_S = 0.5
_LOOK_S, _FAREWELL_S = 0.05, 0.05
_UNBEGUN = frozenset({"waiting", "ready", "constrained"})


class Drain:
    """A worker on its way out.

    Parameters
    ----------
    tell
        Sends a message to the scheduler.
    """

    def __init__(self, worker: Worker, tell: Callable[[dict[str, Any]], None]) -> None:
        self._worker = worker
        self._send = tell
        self._task: asyncio.Task[None] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether notice has been given."""
        return self._task is not None

    def begin(self, seconds: float) -> None:
        """Leave within `seconds`; nothing happens where that is under way."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._leave(seconds))

    async def _leave(self, seconds: float) -> None:
        worker = self._worker
        margin = min(_MARGIN_S, _MARGIN * seconds)
        end = time.monotonic() + seconds
        stop = end - margin
        logger.warning("Worker %s ends in %.0f s: it takes its leave", worker.address, seconds)
        self._send({"op": "pcm-notice", "seconds": seconds - margin})
        await self._ask_nanny("close_gracefully", margin, reason="notice")  # starts no other
        # The gate may still send what ends in time.
        await _until(lambda: not self._has_on_lanes(), stop, _IDLE_S)
        if worker.status not in (Status.running, Status.paused, Status.closing_gracefully):
            return  # somebody else ends it
        # Not paused, which ends as soon as there is memory: nothing more begins, and plain Dask
        # sends nothing either.
        worker.status = Status.closing_gracefully
        give_back(worker, [key for key, ts in worker.state.tasks.items() if is_unbegun(ts)])
        await _until(lambda: not worker.state.all_running_tasks, stop)
        await asyncio.sleep(_FAREWELL_S)  # what is to be told of them is sent
        await self._hand_over(end - margin / 2 - time.monotonic())
        left = max(margin / 2, end - time.monotonic())
        if await self._ask_nanny("pcm_end", margin, seconds=left) is None:
            # What still runs is lost with the process: it is not waited for.
            await worker.close(executor_wait=False, timeout=left, reason="notice")

    def _has_on_lanes(self) -> bool:
        state = self._worker.state
        here = (state.all_running_tasks, state.waiting, state.ready, state.constrained)
        return any(map(is_on_lane, itertools.chain.from_iterable(here)))

    async def _hand_over(self, seconds: float) -> None:
        """Have results in memory go to peers, and be off the scheduler's list."""
        worker, stimulus_id = self._worker, f"pcm-leave-{time.time()}"
        about: dict[str, Any] = {"close_workers": False, "remove": True}
        try:
            retired = worker.scheduler.retire_workers(
                workers=[worker.address], **about, stimulus_id=stimulus_id
            )
            await asyncio.wait_for(retired, max(0.0, seconds))
        except Exception as error:  # of the scheduler's as well: it is left all the same
            logger.warning("Not all results of %s have reached a peer: %r", worker.address, error)
        # Where nobody could take them it is still listed: what it ran is no suspect either.
        with suppress(Exception):
            await worker.scheduler.unregister(
                address=worker.address, expected=True, close=False, stimulus_id=stimulus_id
            )

    async def _ask_nanny(self, op: str, timeout: float, **says: Any) -> Any:
        """Call a handler of the nanny; None where there is none, or it does not answer."""
        if not self._worker.nanny:
            return None
        asked = getattr(self._worker.rpc(self._worker.nanny), op)(**says)
        try:
            return await asyncio.wait_for(asked, timeout)
        except Exception:  # it is on its way out, or knows nothing of this
            return None


def is_unbegun(ts: TaskState) -> bool:
    """Whether a task is to be executed here and has not begun."""
    return ts.state in _UNBEGUN


def free(worker: Worker, keys: Collection[Any]) -> None:
    """Drop tasks that have not begun; whoever is told of it may have them executed elsewhere."""
    event = FreeKeysEvent(keys=keys, stimulus_id=f"pcm-return-{time.time()}")
    worker.handle_stimulus(event)


def give_back(worker: Worker, keys: Collection[Any]) -> None:
    """Have Dask schedule tasks anew that have not begun here."""
    free(worker, keys)
    for key in keys:
        stimulus_id = f"pcm-give-back-{time.time()}"
        worker.batched_send({"op": "reschedule", "key": key, "stimulus_id": stimulus_id})


async def _until(is_over: Callable[[], bool], stop: float, lasting_s: float = 0.0) -> None:
    """Wait until it has been so for a while, or the clock (monotonic) stands at `stop`."""
    since: float | None = None
    while (now := time.monotonic()) < stop:
        if not is_over():
            since = None
        else:
            since = since or now
            if now - since >= lasting_s:
                return
        await asyncio.sleep(_LOOK_S)


def ends_in_s(walltime_s: float | None) -> float | None:
    """Seconds until the batch system ends this worker; None where nobody says when.

    Parameters
    ----------
    walltime_s
        That long after the start of ``dask worker``; None for what Slurm says.
    """
    if walltime_s is not None:
        return max(0.0, _started_at() + walltime_s - time.time())
    try:
        return max(0.0, int(os.environ["SLURM_JOB_END_TIME"]) - time.time())
    except (KeyError, ValueError):
        return None


def _started_at() -> float:
    """When the process began that this worker's life began with: its nanny's, if it has one.

    Worker processes may have come and gone since, and a fork server may stand in between.
    """
    parent = multiprocessing.parent_process()
    try:
        started: float = psutil.Process(parent.pid if parent else None).create_time()
    except psutil.Error:
        started = psutil.Process().create_time()
    return started
