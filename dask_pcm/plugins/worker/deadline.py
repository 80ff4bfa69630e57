"""Calls that may take only so long: past that, their process is ended.

Nothing can interrupt a call that hangs in native code, and such code may hold Python's lock for
ever. What ends the process is a thread of ``faulthandler``, which needs no lock, and says where
each thread was. The nanny starts another process; rows that were computed are treated as rows that
kill.

A process has one such thread, so it is always set to what ends first.
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
    """How long calls on this thread may take, where their own function does not say.

    Attributes
    ----------
    descriptor
        An open file that is told, before the process ends, where its threads were.
    """

    seconds: float | None = None
    descriptor: int = _STDERR


_rule = _Rule()


@dataclass(slots=True)
class _Call:
    """A call that ends at a time of the monotonic clock, or is stopped with so much time left."""

    ends_at: float
    descriptor: int
    left_s: float | None = None


class Deadlines:
    """Of all calls in this process; threads of any kind may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}  # by thread

    def begin(self, seconds: float, descriptor: int) -> None:
        """The calling thread has so many seconds from now on."""
        with self._lock:
            self._calls[threading.get_ident()] = _Call(time.monotonic() + seconds, descriptor)
            self._set()

    def end(self) -> None:
        """The calling thread is done in time."""
        with self._lock:
            self._calls.pop(threading.get_ident(), None)
            self._set()

    def stop(self, is_stopped: bool) -> None:
        """The calling thread waits for others, which is not its fault; or goes on."""
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
        running = [call for call in self._calls.values() if call.left_s is None]
        if not running:
            faulthandler.cancel_dump_traceback_later()
            return
        first = min(running, key=lambda call: call.ends_at)
        left_s = max(1e-3, first.ends_at - time.monotonic())
        faulthandler.dump_traceback_later(left_s, exit=True, file=first.descriptor)


@functools.cache
def of_process() -> Deadlines:
    """Those of this process."""
    return Deadlines()


@contextmanager
def ruled(seconds: float | None, descriptor: int | None) -> Iterator[None]:
    """Within, on this thread, calls may take so long, and a file is told of those that do not end.

    The file by default is standard error.
    """
    _rule.seconds = seconds
    _rule.descriptor = _STDERR if descriptor is None else descriptor
    try:
        yield
    finally:
        _rule.seconds, _rule.descriptor = None, _STDERR


@contextmanager
def in_time(seconds: float | None) -> Iterator[None]:
    """Within, for so many seconds at most, a call; None for as long as the rule on this thread."""
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
    """Within, the clock of a call on this thread stands still."""
    of_process().stop(True)
    try:
        yield
    finally:
        of_process().stop(False)


def _may_end() -> bool:
    """Whether another process comes after this one, and nothing but the worker is in it."""
    try:
        worker = get_worker()
    except ValueError:  # not on a cluster
        return False
    if not worker.nanny:
        _warn_without_nanny(worker.address)
    return bool(worker.nanny)


@functools.cache
def _warn_without_nanny(address: str) -> None:
    warn(
        f"batch_timeout has no effect on {address}: a call that takes longer is ended with its"
        " process, and this worker has no nanny that would start another. Start workers with"
        " nannies, as LocalCluster and dask worker do by default.",
    )
