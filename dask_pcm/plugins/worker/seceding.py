"""A task that secedes while it uses an exclusive context: others may use it until it rejoins.

``compute()``, ``worker_client()`` and ``secede()`` in a function have its task leave the worker's
threads while it waits for others. It comes back when one of these has a place for it. If all of
them waited for the context that it holds, none would ever have one.

Dask has no hook for either. It looks up the executor of the calling thread, so that thread is shown
an executor that tells; the one that runs tasks stays as it is.
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
    """The executor of a thread, as ``secede`` and ``rejoin`` see it."""

    def __init__(self, executor: Any, turns: Turns) -> None:
        self._executor = executor
        self._turns = turns
        self._given: list[tuple[Residency, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def _adjust_thread_count(self) -> None:
        """``secede``: the thread has left."""
        self._given = self._turns.give_back()
        self._executor._adjust_thread_count()

    def submit(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """``rejoin``: wakes a thread that makes place; then this one goes on with its turns."""
        me = threading.current_thread()
        with self._executor._rejoin_lock:  # else it has been let in already
            let_in = [event for one, event in self._executor._rejoin_list if one is me]
        woken: Future[Any] = self._executor.submit(func, *args, **kwargs)
        with stopped():
            for event in let_in:
                event.wait()
            thread_state.proceed = True  # also where the turns are refused: it has its place
            given, self._given = self._given, []
            self._turns.take_again(given)
        return woken


@contextmanager
def giving_back(turns: Turns) -> Iterator[None]:
    """Within, the task on this thread gives back what it uses for as long as it has seceded."""
    executor = getattr(thread_state, "executor", None)
    if executor is None or isinstance(executor, _Telling):  # no thread of Dask's; told already
        yield
        return
    thread_state.executor = _Telling(executor, turns)
    try:
        yield
    finally:
        thread_state.executor = executor
