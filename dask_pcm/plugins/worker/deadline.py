"""A call that exceeds its timeout ends its worker process.

Nothing can interrupt a call that hangs in native code, and such code may hold Python's GIL forever.
So ``faulthandler`` ends the process from a C thread that does not need the GIL, and dumps the
traceback of every thread. The nanny starts another process. The rows that were being computed are
treated like rows that crash the process.

A process has one ``faulthandler`` timer, so it is always set to the earliest deadline.
"""

from __future__ import annotations

import faulthandler
import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distributed import get_worker, warn

_STDERR = 2


class _Rule(threading.local):
    """The default timeout of calls on this thread, for functions that have none of their own.

    Attributes
    ----------
    seconds
        None for no timeout.
    descriptor
        An open file that receives the tracebacks before the process ends.
    """

    seconds: float | None = None
    descriptor: int = _STDERR


_rule = _Rule()


@dataclass(slots=True)
class _Call:
    """A call's deadline on the monotonic clock; `left_s` is what remains while it is paused."""

    ends_at: float
    descriptor: int
    left_s: float | None = None


class Deadlines:
    """The deadlines of all calls in this process, one per thread; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}  # by thread

    def begin(self, seconds: float, descriptor: int) -> None:
        """Start the calling thread's deadline, `seconds` from now."""
        with self._lock:
            self._calls[threading.get_ident()] = _Call(time.monotonic() + seconds, descriptor)
            self._set()

    def end(self) -> None:
        """End the calling thread's deadline: it was met."""
        with self._lock:
            self._calls.pop(threading.get_ident(), None)
            self._set()

    def stop(self, is_stopped: bool) -> None:
        """Pause the calling thread's deadline while it waits for other tasks, or resume it."""
        with self._lock:
            call = self._calls.get(threading.get_ident())
            if call is None:
                return
            if is_stopped:
                call.left_s = call.ends_at - time.monotonic()
            elif call.left_s is not None:
                call.ends_at, call.left_s = time.monotonic() + call.left_s, None
            self._set()

    def _set(self) -> None:
        """Set the timer to the earliest deadline; with the lock held."""
        running = [call for call in self._calls.values() if call.left_s is None]
        if not running:
            faulthandler.cancel_dump_traceback_later()
            return
        first = min(running, key=lambda call: call.ends_at)
        left_s = max(1e-3, first.ends_at - time.monotonic())  # faulthandler refuses 0
        faulthandler.dump_traceback_later(left_s, exit=True, file=first.descriptor)


@functools.cache
def of_process() -> Deadlines:
    """The instance of this process."""
    return Deadlines()


@contextmanager
def ruled(seconds: float | None, descriptor: int | None) -> Iterator[None]:
    """Set this thread's default timeout within the block, and the file that gets the tracebacks.

    The default file is standard error.
    """
    _rule.seconds = seconds
    _rule.descriptor = _STDERR if descriptor is None else descriptor
    try:
        yield
    finally:
        _rule.seconds, _rule.descriptor = None, _STDERR


@contextmanager
def in_time(seconds: float | None) -> Iterator[None]:
    """End the process if the block takes longer than `seconds`; None for the thread's default."""
    seconds = _rule.seconds if seconds is None else seconds
    if seconds is None or not _may_end():
        yield
        return
    of_process().begin(seconds, _rule.descriptor)
    try:
        yield
    finally:
        of_process().end()


@contextmanager
def stopped() -> Iterator[None]:
    """Pause the deadline of the call on this thread within the block."""
    of_process().stop(True)
    try:
        yield
    finally:
        of_process().stop(False)


def _may_end() -> bool:
    """Whether this process may be ended: it is a worker's own, and a nanny starts another one."""
    try:
        worker = get_worker()
    except ValueError:  # not on a cluster
        return False
    if not worker.nanny:
        _warn_without_nanny(worker.address)
    return bool(worker.nanny)


@functools.cache
def _warn_without_nanny(address: str) -> None:
    """Warn once per worker that timeouts have no effect on it."""
    warn(
        f"batch_timeout has no effect on {address}: a call that takes longer is ended with its"
        " process, but this worker has no nanny to start another one. Start workers with"
        " nannies, as LocalCluster and dask worker do by default.",
    )
