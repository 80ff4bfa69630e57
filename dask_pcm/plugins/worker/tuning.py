"""Process settings for inference apply only while contexts are in use.

Plain Dask work must behave as without the toolkit. So the settings are made when a context is
loaded or held, and reverted once none has been in use for a while; only ``TOKENIZERS_PARALLELISM``
stays where it had no value (see ``_TOKENIZERS``). Heaps that have grown meanwhile
stay, and plain tasks allocate from them too: from then on, free memory there is returned to the
system every few seconds.
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
#: Python's switch interval: how long a thread that reads or commits keeps the GIL from the one that
#: infers. The default of 5 ms is an eighth of a batch.
_SWITCH_S = 5e-4
#: Milliseconds between two samples of what busy threads do, for the profile on Dask's dashboard: as
#: Dask has it, and while contexts are in use. Each keeps the GIL from threads that infer for half
#: a millisecond. Another interval, which a user has chosen, stays.
_SAMPLE_MS, _SELDOM_MS = 10.0, 100.0
#: Variables that model libraries read; OMP_NUM_THREADS affects libraries imported later. Neither is
#: ever deleted: a thread of the user's that iterates over ``os.environ`` at that moment would fail.
_TOKENIZERS, _THREADS = "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"
#: Settings are reverted after this long without use; batches of a run follow each other faster.
_IDLE_S = 2.0
#: Interval between checks whether contexts are in use; it grows up to the maximum while they are
#: not. Each check returns free memory: plain tasks free what they had from the heaps, too.
_LOOK_S, _MAX_LOOK_S = 1.0, 4.0
_LIVING = frozenset({Status.init, Status.starting, Status.running, Status.paused})


class Tuning:
    """Makes and reverts the settings of this process; for any thread."""

    def __init__(self) -> None:
        #: Notified when contexts are in use again, and when a worker loses the toolkit.
        self._changing = threading.Condition()
        self._n_using = 0
        #: Workers of this process that have the toolkit; and these with those that have had it.
        self._workers: WeakSet[Worker] = WeakSet()
        self._all_workers: WeakSet[Worker] = WeakSet()
        #: Workers whose threads are sampled less often.
        self._seldom: WeakSet[Worker] = WeakSet()
        self._used_at = 0.0
        self._is_watched = False
        #: The former switch interval and variables; None while nothing is changed.
        self._before: tuple[float, dict[str, str]] | None = None
        self._set: dict[str, str] = {}

    def add_worker(self, worker: Worker) -> None:
        """A worker of this process has got the toolkit."""
        with self._changing:
            self._workers.add(worker)
            self._all_workers.add(worker)
            if self._before is not None:
                self._sample_seldom(worker)

    def remove_worker(self, worker: Worker) -> None:
        """A worker has lost the toolkit; with the last one, settings are reverted without delay."""
        with self._changing:
            self._workers.discard(worker)
            self._sample_as_before(worker)
            self._changing.notify_all()
        self._settle()
        give_back_memory()

    @contextmanager
    def in_use(self, n_threads: int) -> Iterator[None]:
        """Apply the settings while a context is loaded or held, with `n_threads` CPU threads."""
        with self._changing:
            self._n_using += 1
            if self._before is None:
                self._before = (sys.getswitchinterval(), {})
                sys.setswitchinterval(_SWITCH_S)
                keep_freed_memory()
                for worker in self._workers:
                    self._sample_seldom(worker)
                self._changing.notify_all()
            if _THREADS in os.environ:  # Dask's nanny sets it to 1
                self._set_variable(_THREADS, str(n_threads))
            os.environ.setdefault(_TOKENIZERS, "false")
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._watch, name="pcm-tuning", daemon=True).start()
        try:
            yield
        finally:
            with self._changing:
                self._n_using -= 1
                self._used_at = time.monotonic()

    def _sample_seldom(self, worker: Worker) -> None:
        """Sample a worker's threads less often, if as often as Dask does; with the lock held."""
        profile = worker.periodic_callbacks.get("profile")
        if profile is not None and profile.callback_time == _SAMPLE_MS:
            profile.callback_time = _SELDOM_MS
            self._seldom.add(worker)

    def _sample_as_before(self, worker: Worker) -> None:
        """Undo ``_sample_seldom``, unless the interval has changed since; with the lock held."""
        profile = worker.periodic_callbacks.get("profile")
        if worker in self._seldom and profile.callback_time == _SELDOM_MS:
            profile.callback_time = _SAMPLE_MS
        self._seldom.discard(worker)

    def _set_variable(self, name: str, value: str) -> None:
        """Set an environment variable and remember its former value; with the lock held."""
        assert self._before is not None
        self._before[1].setdefault(name, os.environ[name])
        os.environ[name] = self._set[name] = value

    def _watch(self) -> None:
        """Revert settings and return free memory; on a thread of its own.

        Ends once everything is reverted and no worker that has had the toolkit lives.
        """
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
        """Revert the settings unless contexts are in use; return whether none is."""
        with self._changing:
            if self._before is not None:
                idle_s = time.monotonic() - self._used_at
                if self._n_using or (self._workers and idle_s < _IDLE_S):
                    return False
                self._restore(*self._before)
                self._before = None
            return True

    def _restore(self, switch_s: float, variables: Mapping[str, str]) -> None:
        """Restore former values; those that other code has changed since stay as they are."""
        if abs(sys.getswitchinterval() - _SWITCH_S) < 1e-6:  # Python rounds to microseconds
            sys.setswitchinterval(switch_s)
        for worker in self._workers:
            self._sample_as_before(worker)
        for name, value in variables.items():
            if os.environ.get(name) == self._set.pop(name):
                os.environ[name] = value
        free_memory_as_before()


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory for the next batch; False if it is not glibc's.

    Dask's nanny sets the opposite (``MALLOC_TRIM_THRESHOLD_``). Then every large tensor is mapped
    and unmapped, which doubles the CPU time of a batch.
    """
    return _set_thresholds(_KEPT_BYTES, _HEAP_BYTES)


def free_memory_as_before() -> bool:
    """Make the allocator return freed memory as it was started to; False if it is not glibc's."""
    trim = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    if trim.isdecimal():
        mapped = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
        return _set_thresholds(int(trim), int(mapped) if mapped.isdecimal() else 128 << 10)
    # By default glibc adapts both thresholds, up to these values. Once set they stay fixed, so the
    # adapted values are the closest to the default.
    return _set_thresholds(2 * _HEAP_BYTES, _HEAP_BYTES)


def give_back_memory() -> None:
    """Return free memory in the allocator's heaps to the system; does nothing without glibc."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def _set_thresholds(trim_bytes: int, mapped_bytes: int) -> bool:
    """Set glibc's thresholds; False if the allocator is another."""
    libc = _libc()
    if libc is None:
        return False
    limit = (1 << 31) - 1  # mallopt takes an int
    trims = libc.mallopt(_M_TRIM_THRESHOLD, min(trim_bytes, limit))
    maps = libc.mallopt(_M_MMAP_THRESHOLD, min(mapped_bytes, _HEAP_BYTES))
    return bool(trims and maps)


@functools.cache
def _libc() -> Any:
    """glibc; None if the allocator is another."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


@functools.cache
def tuning() -> Tuning:
    """The instance of this process, which may have several workers."""
    return Tuning()
