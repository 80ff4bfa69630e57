"""A task asks whether the computation that it belongs to is hopeless.

In Dask's own ``compute`` no process sees all results. So a task whose rows all failed asks the
scheduler, which knows of the others (see ``scheduling/rules/first_batches.py`` for the rule). Tasks
in which a row succeeded do not ask: where they stand, the rule ends.
"""

from __future__ import annotations

import asyncio
import logging
import threading

from distributed import get_worker

from dask_pcm.scheduling.rules.first_batches import Failing, FirstBatches, Frames, Position

logger = logging.getLogger(__name__)

_TIMEOUT_S = 30.0


class _OfProcess:
    """Frames that are computed in this process alone, by Dask's local schedulers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames = Frames(lambda frame: self)

    def note(self, position: Position, failing: Failing) -> bool:
        with self._lock:
            return self._frames.note(position, failing)


_of_process = _OfProcess()


def is_hopeless(position: Position, failing: Failing) -> bool:
    """Whether the computation that the task on this thread belongs to is hopeless.

    All rows of its partition failed, or all that it has come to.
    """
    alone = FirstBatches()
    alone.note(position.number, failing)
    if alone.is_hopeless(position.n_partitions):
        return True
    try:
        worker = get_worker()
    except ValueError:
        return _of_process.note(position, failing)
    asked = asyncio.run_coroutine_threadsafe(
        worker.scheduler.pcm_failing(**position._asdict(), **failing._asdict()),
        worker.loop.asyncio_loop,
    )
    try:
        return bool(asked.result(_TIMEOUT_S))
    except Exception as error:
        logger.info("The scheduler cannot tell whether %s is hopeless: %r", position.frame, error)
        return _of_process.note(position, failing)
