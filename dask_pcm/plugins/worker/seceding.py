"""A task that secedes gives up its turns on exclusive contexts until it rejoins.

``compute()``, ``worker_client()`` and ``secede()`` make a task leave its worker's threads while it
waits for other tasks. It rejoins when a thread has a place for it. If it kept its contexts and all
threads waited for one of them, no place would ever become free.

Dask has no hook for seceding or rejoining. It looks up the executor of the calling thread, so that
thread gets a proxy of the executor that gives up the turns; the executor itself does not change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from distributed.threadpoolexecutor import thread_state

from dask_pcm.ladder.residency import Residency
from dask_pcm.ladder.turns import Turns
from dask_pcm.plugins.worker.deadline import stopped


class _Telling:
    """A proxy of a thread's executor, as ``secede`` and ``rejoin`` use it; for that thread."""

    def __init__(self, executor: Any, turns: Turns, tell: Callable[[str], None]) -> None:
        self._executor = executor
        self._turns = turns
        self._tell = tell
        self._given: list[tuple[Residency, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def _adjust_thread_count(self) -> None:
        """Called by ``secede``, once the thread has left: give up its turns."""
        self._given = self._turns.give_back()
        self._tell("pcm-handed-over")  # Dask tells the first time only
        self._executor._adjust_thread_count()

    def submit(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Called by ``rejoin`` to wake a thread that makes place: then take the turns again."""
        me = threading.current_thread()
        # Read before the wake-up: afterwards the other thread removes the entry.
        with self._executor._rejoin_lock:
            let_in = [event for one, event in self._executor._rejoin_list if one is me]
        woken: Future[Any] = self._executor.submit(func, *args, **kwargs)
        with stopped():
            # First the place, then the turns: with turns held, a wait for the place could deadlock.
            for event in let_in:
                event.wait()
            if let_in:
                self._tell("pcm-rejoined")
            thread_state.proceed = True  # it has its place, even if the turns are refused below
            given, self._given = self._given, []
            self._turns.take_again(given)
        return woken


@contextmanager
def giving_back(turns: Turns, tell: Callable[[str], None]) -> Iterator[None]:
    """Within the block, the task on this thread gives up its turns while it has seceded.

    Parameters
    ----------
    tell
        Tells the gate that the task leaves its lane, or is back.
    """
    executor = getattr(thread_state, "executor", None)
    # Not a thread of Dask's, or nested in another block.
    if executor is None or isinstance(executor, _Telling):
        yield
        return
    thread_state.executor = _Telling(executor, turns, tell)
    try:
        yield
    finally:
        thread_state.executor = executor
