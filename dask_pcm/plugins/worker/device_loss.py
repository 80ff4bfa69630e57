"""A lost device costs its process: the nanny starts another one, and the task runs again.

After a device assert, an illegal access or an ECC error, a process cannot use its device any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from distributed import Reschedule, Worker
from distributed.core import Status

from dask_pcm.errors import DeviceError

logger = logging.getLogger(__name__)

#: Timeout of requests to the scheduler; how long the last messages need to be sent; and how long
#: running tasks may take before the process is replaced.
_TIMEOUT_S, _FAREWELL_S, _CLOSING_S = 30.0, 0.05, 2.0


class DeviceLoss:
    """Replaces a worker's process once its device has failed.

    Parameters
    ----------
    n_attempts
        Processes that a task may cost before it counts as the cause.
    is_draining
        Whether the worker drains, so that no other process is to be started.
    """

    def __init__(self, worker: Worker, n_attempts: int, is_draining: Callable[[], bool]) -> None:
        self._worker = worker
        self._n_attempts = n_attempts
        self._is_draining = is_draining
        #: Whether this process can no longer use its device.
        self._is_lost = False

    def end_task(self, error: BaseException) -> None:
        """Replace this process, whose device has failed in a task; for the task's thread.

        Raises
        ------
        Reschedule
            So that the task runs again, in another process.
        DeviceError
            If the task has failed in too many processes: the task itself may be the cause. Or if
            there is no nanny to start another process.
        """
        if not self._worker.nanny:
            raise DeviceError(
                f"The process of {self._worker.address} can no longer use its device, and has no"
                f" nanny to start another process: {error}. Start workers with nannies."
            ) from error
        is_first = not self._is_lost
        self.restart(f"it can no longer use its device ({error})")
        key = self._worker.get_current_task()
        told = asyncio.run_coroutine_threadsafe(
            self._worker.scheduler.pcm_lost_device(key=key, is_cause=is_first),
            self._worker.loop.asyncio_loop,
        )
        n_times: int = told.result(_TIMEOUT_S)
        if n_times < self._n_attempts:
            raise Reschedule from error
        raise DeviceError(
            f"Task {key!r} lost {n_times} worker processes, which could no longer use their device."
            f" The last error: {error}"
        ) from error

    def restart(self, why: str) -> None:
        """Start to replace this process, once; for any thread. Needs a nanny."""
        if not self._is_lost and self._worker.nanny:
            self._is_lost = True
            logger.error("The process of worker %s is replaced: %s", self._worker.address, why)
            self._worker.loop.add_callback(self._leave, why)

    async def _leave(self, why: str) -> None:
        """Close this process and start a new one, once results of running tasks have been sent."""
        if self._worker.status is Status.running:
            self._worker.status = Status.paused  # no further task begins here
        deadline = time.monotonic() + _CLOSING_S
        while self._worker.state.executing and time.monotonic() < deadline:
            await asyncio.sleep(_FAREWELL_S)
        await asyncio.sleep(_FAREWELL_S)
        await self._worker.close_gracefully(restart=not self._is_draining(), reason=why)
