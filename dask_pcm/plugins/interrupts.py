"""Interrupts that are meant for the client, and reach its workers as well.

Ctrl-C in a terminal and the stop button of a notebook send SIGINT to a group of processes: to the
client, and to all that its process has started, which are the workers of a ``LocalCluster`` and
their fork server. Those would end, and the same call could not be resumed.

A process inherits the signals that are blocked in the thread that starts it. So the threads that
nannies run on block SIGINT, which the main thread, whose signals are the user's, does not notice.
A worker that is there already ignores it. Only those with a nanny do: it ends them in time.
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
    """Who wants that what this thread starts is not interrupted."""

    def __init__(self) -> None:
        self._owners: set[object] = set()
        self._is_ours = False

    def block(self, owner: object) -> None:
        """Block SIGINT in this thread; nothing happens in the main one."""
        if _is_main():
            return
        if not self._owners:
            self._is_ours = signal.SIGINT not in _block()
        self._owners.add(owner)

    def unblock(self, owner: object) -> None:
        """One fewer wants it; when nobody does, what this thread starts can be interrupted."""
        if owner in self._owners:
            self._owners.remove(owner)
            if not self._owners and self._is_ours:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have processes that begin meanwhile, in whatever thread this is, not be interrupted."""
    before = _block()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Ignored:
    """SIGINT in a worker's process that is there already."""

    def __init__(self) -> None:
        self._former: Any = None

    def begin(self) -> None:
        """Ignore it from now on."""
        if self._former is None and _is_main():
            self._former = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end(self) -> None:
        """The former handler is back, unless another has been put there since."""
        if self._former is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._former)
        self._former = None


def _block() -> set[signal.Signals]:
    # Python starts its resource tracker with the first queue, and unblocks SIGINT when it has.
    resource_tracker.ensure_running()
    return {*signal.pthread_sigmask(signal.SIG_BLOCK, _SIGINT)}  # type: ignore[arg-type]


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


@functools.cache
def interrupts() -> Interrupts:
    """Those of this process."""
    return Interrupts()
