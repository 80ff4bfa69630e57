"""Memory limits of a worker that holds weights: these are no leak."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from distributed import Worker

from dask_pcm.plugins.nanny.plugin import NannyLink


class MemoryAllowance:
    """Raises the limits at which a worker pauses, and its nanny kills it, by what contexts take.

    Weights count as process memory, and no spilling makes them smaller: a worker whose model
    fills it would be paused for ever, or killed in a loop.
    """

    def __init__(self, worker: Worker, nanny: NannyLink) -> None:
        self._worker = worker
        self._nanny = nanny
        self._limit = worker.memory_manager.memory_limit
        self._taken: dict[str, int] = {}
        self._is_over = False
        #: Contexts that load now: a loader may acquire others, and tasks load what was hidden.
        self._n_growing = 0
        self._counting = threading.Lock()
        self._telling = threading.Lock()

    def begin(self) -> None:
        """As if no context had been here: an earlier process may have had some."""
        if self._limit:
            self._raise()

    @contextmanager
    def growing(self, digest: str, mapped_bytes: Callable[[str], int]) -> Iterator[None]:
        """While a context loads there is no limit; afterwards it is raised by what was taken.

        What is mapped is not touched yet, and will be.
        """
        if not self._limit:
            yield
            return
        before = _rss_bytes()
        with self._unlimited():
            try:
                yield
            finally:
                taken = max(0, _rss_bytes() - before, mapped_bytes(digest))
                with self._counting:
                    self._taken[digest] = taken

    @contextmanager
    def _unlimited(self) -> Iterator[None]:
        with self._counting:
            self._n_growing += 1
        try:
            self._raise()
            yield
        finally:
            with self._counting:
                self._n_growing -= 1
            self._raise()

    def freed(self, digest: str) -> None:
        """A context has left; on any thread but the event loop's."""
        with self._counting:
            was_here = self._taken.pop(digest, None) is not None
        if was_here and self._limit:
            self._raise()

    def forget(self) -> None:
        """The toolkit leaves, as it does from the nanny, which sees to its own limit."""
        self._is_over = True
        if self._limit:
            self._worker.memory_manager.memory_limit = self._limit

    def _raise(self) -> None:
        """Set the limits to what is right now."""
        if self._is_over:
            return
        with self._telling:  # whoever tells last has counted last
            with self._counting:
                n_bytes = sum(self._taken.values())
                is_growing = self._n_growing > 0
            if is_growing:
                n_bytes = psutil.virtual_memory().total
            self._worker.memory_manager.memory_limit = self._limit + n_bytes
            self._nanny.ask("pcm_allow_memory", n_bytes=n_bytes)


def _rss_bytes() -> int:
    n_bytes: int = psutil.Process().memory_info().rss
    return n_bytes
