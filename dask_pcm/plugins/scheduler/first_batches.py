"""Whether a computation is hopeless: both ends of the question.

In Dask's own ``compute`` no process sees all results. So a task whose rows all failed asks the
scheduler, which knows of the others (see ``scheduling/first_batches.py`` for the rule). Tasks in
which a row succeeded say nothing: where they stand, the rule ends.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from distributed import get_worker

from dask_pcm.scheduling.rules.first_batches import Failing, FirstBatches

logger = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
#: Frames that are kept in mind where nothing tells that they are not computed any more.
_MAX_FRAMES = 100


class Position(NamedTuple):
    """Which partition of a frame a task computes."""

    frame: str
    number: int
    n_partitions: int


class Frames:
    """What is known of frames that are computed.

    Parameters
    ----------
    computation
        Returns an object that is another one for each time that a frame is computed; None where
        the frame is not computed any more.
    """

    def __init__(self, computation: Callable[[str], object | None]) -> None:
        self._computation = computation
        self._frames: dict[str, tuple[object, FirstBatches]] = {}

    def note(self, position: Position, failing: Failing) -> bool:
        """All rows of a partition failed; return whether that makes the computation hopeless."""
        frame, number, n_partitions = position
        self._forget()
        now = self._computation(frame)
        found = self._frames.get(frame)
        first = found[1] if found is not None else FirstBatches()
        self._frames[frame] = (now, first)
        first.note(number, failing)
        is_hopeless = first.is_hopeless(n_partitions)
        if is_hopeless:  # what comes of it afterwards begins anew
            del self._frames[frame]
        return is_hopeless

    def _forget(self) -> None:
        """Drop frames that are not computed any more, or are computed anew."""
        for frame, (then, _) in list(self._frames.items()):
            if self._computation(frame) is not then or len(self._frames) > _MAX_FRAMES:
                del self._frames[frame]

    async def on_failing(
        self, frame: str, number: int, n_partitions: int, n_batches: int, kind: str
    ) -> bool:
        """A worker's task asks."""
        return self.note(Position(frame, number, n_partitions), Failing(n_batches, kind))


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
