"""Ctrl-C interrupts the client only: its local workers and their fork server ignore SIGINT.

Ctrl-C in a terminal and the stop button of a notebook send SIGINT to a process group: to the
client and to every process that it started, such as the workers of a ``LocalCluster`` and their
fork server. If these ended too, the interrupted call could not be resumed.

A child process inherits the signal mask of the thread that starts it. So the threads that run
nannies block SIGINT. The main thread is not affected, so the user's own handlers keep working. A
worker that already runs ignores SIGINT; only if it has a nanny, which ends it in time.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

_SIGINT = frozenset({signal.SIGINT})


class Interrupts(threading.local):
    """Blocks SIGINT in the calling thread while it has owners, for processes that it starts.

    Thread-local: ``block`` and ``unblock`` affect the calling thread only.
    """

    def __init__(self) -> None:
        self._owners: set[object] = set()
        self._is_ours = False

    def block(self, owner: object) -> None:
        """Block SIGINT in this thread for `owner`; does nothing in the main thread."""
        if _is_main():
            return
        if not self._owners:
            # If SIGINT was blocked before, it has to stay so afterwards.
            self._is_ours = signal.SIGINT not in _block()
        self._owners.add(owner)

    def unblock(self, owner: object) -> None:
        """End an owner's block; SIGINT is unblocked with the last one."""
        if owner in self._owners:
            self._owners.remove(owner)
            if not self._owners and self._is_ours:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Block SIGINT in this thread, the main one included, for processes started in the block."""
    before = _block()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Ignored:
    """Ignores SIGINT in a worker process that already runs; for its main thread."""

    def __init__(self) -> None:
        self._former: Any = None

    def begin(self) -> None:
        """Ignore SIGINT from now on; does nothing outside the main thread."""
        if self._former is None and _is_main():
            self._former = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end(self) -> None:
        """Restore the former handler, unless another one was set since."""
        if self._former is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._former)
        self._former = None


def _block() -> set[signal.Signals]:
    """Block SIGINT in this thread; return the signals that were blocked before."""
    # Python starts its resource tracker with the first queue and then unblocks SIGINT, which would
    # undo the block: start it now.
    resource_tracker.ensure_running()
    return {*signal.pthread_sigmask(signal.SIG_BLOCK, _SIGINT)}  # type: ignore[arg-type]


def _is_main() -> bool:
    """Whether this is the main thread, the only one that may set handlers."""
    return threading.current_thread() is threading.main_thread()


@functools.cache
def interrupts() -> Interrupts:
    """The instance of this process."""
    return Interrupts()
