"""How a process is set up while contexts are in use, and only then.

Plain Dask work is not to notice that the toolkit is there. So what inference wants of the process
is set when a context is loaded or held, and put back once none has been for a while: what Dask
itself wants holds again. The heaps that have grown meanwhile stay, and plain tasks have their
memory from them, too: from then on what is free there goes back to the system every few seconds.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from distributed import Worker
from distributed.core import Status

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _HEAP_BYTES = 1 << 30, 32 << 20
#: How long a thread that reads or commits keeps Python's lock from the one that infers; Python's
#: own 5 ms are an eighth of a batch.
_SWITCH_S = 5e-4
#: Variables that libraries of models look at; OMP_NUM_THREADS for what is not yet imported.
_TOKENIZERS, _THREADS = "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"
#: Batches of one run follow each other faster than that.
_IDLE_S = 2.0
#: How often it is looked whether contexts are in use. While they are not it is done less and less
#: often, and each time free memory goes back: plain tasks, too, free what they had from the heaps.
_LOOK_S, _MAX_LOOK_S = 1.0, 4.0
_LIVING = frozenset({Status.init, Status.starting, Status.running, Status.paused})


class Tuning:
    """Counts who uses contexts in this process; for any thread."""

    def __init__(self) -> None:
        #: Notified when contexts are in use again, and when a worker leaves.
        self._changing = threading.Condition()
        self._n_using = 0
        #: Workers of this process that have the toolkit, and those that have had it.
        self._workers: WeakSet[Worker] = WeakSet()
        self._all_workers: WeakSet[Worker] = WeakSet()
        self._used_at = 0.0
        self._is_watched = False
        #: Python's switch interval and the variables as they were; None where nothing is set.
        self._before: tuple[float, dict[str, str | None]] | None = None
        self._set: dict[str, str] = {}

    def join(self, worker: Worker) -> None:
        """A worker of this process has the toolkit."""
        with self._changing:
            self._workers.add(worker)
            self._all_workers.add(worker)

    def leave(self, worker: Worker) -> None:
        """It has it no more; without any, all is put back as soon as no task holds a context."""
        with self._changing:
            self._workers.discard(worker)
            self._changing.notify_all()
        self._settle()
        give_back_memory()

    @contextmanager
    def in_use(self, n_threads: int) -> Iterator[None]:
        """While a context is loaded or held; `n_threads` are what it may use of the CPU."""
        with self._changing:
            self._n_using += 1
            if self._before is None:
                self._before = (sys.getswitchinterval(), {})
                sys.setswitchinterval(_SWITCH_S)
                keep_freed_memory()
                self._changing.notify_all()
            self._set_variable(_THREADS, str(n_threads))
            if _TOKENIZERS not in os.environ:
                self._set_variable(_TOKENIZERS, "false")
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._watch, name="pcm-tuning", daemon=True).start()
        try:
            yield
        finally:
            with self._changing:
                self._n_using -= 1
                self._used_at = time.monotonic()

    def _set_variable(self, name: str, value: str) -> None:
        assert self._before is not None
        self._before[1].setdefault(name, os.environ.get(name))
        os.environ[name] = self._set[name] = value

    def _watch(self) -> None:
        """For as long as something is to be put back, or a worker that had the toolkit lives."""
        wait_s = _LOOK_S
        while True:
            with self._changing:
                is_living = any(worker.status in _LIVING for worker in self._all_workers)
                if not is_living and self._before is None:
                    self._is_watched = False
                    return
                self._changing.wait(wait_s)
            if self._settle():
                give_back_memory()
                wait_s = min(2 * wait_s, _MAX_LOOK_S)
            else:
                wait_s = _LOOK_S

    def _settle(self) -> bool:
        """Put back what was, if no context is in use; whether none is."""
        with self._changing:
            if self._before is not None:
                idle_s = time.monotonic() - self._used_at
                if self._n_using or (self._workers and idle_s < _IDLE_S):
                    return False
                self._put_back(*self._before)
                self._before = None
            return True

    def _put_back(self, switch_s: float, variables: Mapping[str, str | None]) -> None:
        """What has been changed since by others stays."""
        if abs(sys.getswitchinterval() - _SWITCH_S) < 1e-6:  # it is kept in microseconds
            sys.setswitchinterval(switch_s)
        for name, value in variables.items():
            if os.environ.get(name) != self._set.pop(name):
                continue
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        free_memory_as_before()


def keep_freed_memory() -> bool:
    """Have the allocator keep what is freed, for the next batch; False where it is not glibc.

    Dask's nanny asks for the opposite (``MALLOC_TRIM_THRESHOLD_``), which makes torch map and
    unmap every sizeable tensor: twice the CPU time of a batch.
    """
    return _set_thresholds(_KEPT_BYTES, _HEAP_BYTES)


def free_memory_as_before() -> bool:
    """Have the allocator give back what is freed, as it was started to; False as above."""
    trim = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    if trim.isdecimal():
        mapped = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
        return _set_thresholds(int(trim), int(mapped) if mapped.isdecimal() else 128 << 10)
    # Without the variable both grow with what is freed, to these. Once set they do not any more.
    return _set_thresholds(2 * _HEAP_BYTES, _HEAP_BYTES)


def give_back_memory() -> None:
    """Give the system what is free in the allocator's heaps; nothing happens without glibc."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def _set_thresholds(trim_bytes: int, mapped_bytes: int) -> bool:
    libc = _libc()
    if libc is None:
        return False
    limit = (1 << 31) - 1  # what mallopt takes is an int
    trims = libc.mallopt(_M_TRIM_THRESHOLD, min(trim_bytes, limit))
    maps = libc.mallopt(_M_MMAP_THRESHOLD, min(mapped_bytes, _HEAP_BYTES))
    return bool(trims and maps)


@functools.cache
def _libc() -> Any:
    """glibc; None where the allocator is another."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


@functools.cache
def tuning() -> Tuning:
    """That of this process, in which there may be several workers."""
    return Tuning()
