"""A worker's memory limits rise by what its contexts take, since weights are not a leak."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from distributed import Worker

from dask_pcm.plugins.nanny.plugin import NannyLink


class MemoryAllowance:
    """Raises the limits at which a worker pauses and its nanny kills it.

    Weights count as process memory and cannot be spilled. A worker filled by its model would be
    paused forever, or killed again and again.

    Methods wait for the nanny, so they may be called from any thread but the event loop's; only
    ``forget`` is for the event loop.
    """

    def __init__(self, worker: Worker, nanny: NannyLink) -> None:
        self._worker = worker
        self._nanny = nanny
        self._limit = worker.memory_manager.memory_limit
        self._taken: dict[str, int] = {}
        self._is_over = False
        #: Contexts that load now. There may be several: a loader may acquire other contexts, and
        #: tasks load those that the gate could not see.
        self._n_growing = 0
        self._counting = threading.Lock()
        self._telling = threading.Lock()

    def begin(self) -> None:
        """Set the limits for a process without contexts; its predecessor may have raised them."""
        if self._limit:
            self._raise()

    @contextmanager
    def growing(
        self,
        digest: str,
        mapped_bytes: Callable[[str], int],
        later_bytes: Callable[[str], int] = lambda _: 0,
    ) -> Iterator[None]:
        """Lift the limits while a context loads; afterwards raise them by what it takes.

        Mapped memory counts in full: its pages become resident only when they are first used. So
        does what it may take later.
        """
        if not self._limit:
            yield
            return
        before = _rss_bytes()
        with self._unlimited():
            try:
                yield
            finally:
                taken = max(0, _rss_bytes() - before, mapped_bytes(digest)) + later_bytes(digest)
                with self._counting:
                    self._taken[digest] = taken

    @contextmanager
    def _unlimited(self) -> Iterator[None]:
        """Lift the limits within the block."""
        with self._counting:
            self._n_growing += 1
        try:
            self._raise()
            yield
        finally:
            with self._counting:
                self._n_growing -= 1
            self._raise()

    def set_taken(self, name: str, n_bytes: int) -> None:
        """Something that is no context takes so much now."""
        with self._counting:
            self._taken[name] = n_bytes
        if self._limit:
            self._raise()

    def freed(self, digest: str) -> None:
        """A context was dropped: lower the limits again."""
        with self._counting:
            was_here = self._taken.pop(digest, None) is not None
        if was_here and self._limit:
            self._raise()

    def forget(self) -> None:
        """Restore the worker's own limit; the nanny's plugin restores the nanny's."""
        self._is_over = True
        if self._limit:
            self._worker.memory_manager.memory_limit = self._limit

    def _raise(self) -> None:
        """Compute the limits and set them here and at the nanny."""
        if self._is_over:
            return
        # Counted and sent under one lock: the last message carries the last count.
        with self._telling:
            with self._counting:
                n_bytes = sum(self._taken.values())
                is_growing = self._n_growing > 0
            if is_growing:
                n_bytes = psutil.virtual_memory().total
            self._worker.memory_manager.memory_limit = self._limit + n_bytes
            self._nanny.ask("pcm_allow_memory", n_bytes=n_bytes)


def _rss_bytes() -> int:
    """Resident memory of this process."""
    n_bytes: int = psutil.Process().memory_info().rss
    return n_bytes
