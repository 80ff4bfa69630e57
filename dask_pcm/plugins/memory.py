"""Memory of a worker that holds weights: what is freed stays at hand, and weights are no leak."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from distributed import Worker
from distributed.core import Status

logger = logging.getLogger(__name__)

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TIMEOUT_S = 10.0


def keep_freed_memory() -> bool:
    """Have the allocator keep what is freed, for the next batch; False where it is not glibc.

    Dask's nanny asks for the opposite (``MALLOC_TRIM_THRESHOLD_``), which makes torch map and
    unmap every sizeable tensor: twice the CPU time of a batch.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trims = libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        maps = libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    except (OSError, AttributeError):
        return False
    return bool(trims and maps)


class MemoryAllowance:
    """Raises the limits at which a worker pauses, and its nanny kills it, by what contexts take.

    Weights count as process memory, and no spilling makes them smaller: a worker whose model
    fills it would be paused for ever, or killed in a loop.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._limit = worker.memory_manager.memory_limit
        self._taken: dict[str, int] = {}
        self._is_over = False
        if self._limit and worker.nanny:
            worker.loop.add_callback(self._tell_nanny, 0)  # of an earlier process: begin anew

    @contextmanager
    def growing(self, digest: str) -> Iterator[None]:
        """While a context loads there is no limit; afterwards it is raised by what was taken."""
        if not self._limit:
            yield
            return
        self._raise(psutil.virtual_memory().total)
        before = psutil.Process().memory_info().rss
        try:
            yield
        finally:
            self._taken[digest] = max(0, psutil.Process().memory_info().rss - before)
            self._raise(sum(self._taken.values()))

    def freed(self, digest: str) -> None:
        """A context has left; on any thread but the event loop's."""
        if self._taken.pop(digest, None) is not None and self._limit:
            self._raise(sum(self._taken.values()))

    def forget(self) -> None:
        """The toolkit leaves, as it does from the nanny, which sees to its own limit."""
        self._is_over = True
        if self._limit:
            self._worker.memory_manager.memory_limit = self._limit

    def _raise(self, n_bytes: int) -> None:
        if self._is_over:
            return
        self._worker.memory_manager.memory_limit = self._limit + n_bytes
        if self._worker.nanny:
            loop = self._worker.loop.asyncio_loop
            told = asyncio.run_coroutine_threadsafe(self._tell_nanny(n_bytes), loop)
            try:
                told.result(_TIMEOUT_S)
            except TimeoutError:  # a nanny that is held up kills nobody meanwhile
                logger.warning("The nanny of %s did not answer in time", self._worker)

    async def _tell_nanny(self, n_bytes: int) -> None:
        try:
            await self._worker.rpc(self._worker.nanny).pcm_allow_memory(n_bytes=n_bytes)
        except Exception as error:
            # Else it is on its way out, and so are we.
            if self._worker.status is Status.running and not self._is_over:
                logger.warning("The nanny of %s keeps its memory limit: %s", self._worker, error)
