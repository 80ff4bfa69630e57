"""A task whose rows all failed asks the scheduler whether the whole computation should stop.

In Dask's own ``compute`` no process sees all results, but the scheduler hears of every failing
partition (see ``scheduling/rules/first_batches.py`` for the rule). A task in which a row succeeded
does not ask: the function works, so the rule does not apply.
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
    """Failing partitions of this process alone, under Dask's local schedulers; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames = Frames(lambda frame: self)

    def note(self, position: Position, failing: Failing) -> bool:
        """Add a failing partition; return whether its computation should stop."""
        with self._lock:
            return self._frames.note(position, failing)


_of_process = _OfProcess()


def is_hopeless(position: Position, failing: Failing) -> bool:
    """Whether the computation of the task on this thread should stop.

    For the thread of a task that has failed on all rows of its partition so far. Blocks for the
    scheduler's answer.
    """
    # Without a round trip if this partition alone decides it.
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
        # No gate, or no answer: judge by the partitions that this process has seen.
        logger.info("The scheduler did not answer about failing %s: %r", position.frame, error)
        return _of_process.note(position, failing)
