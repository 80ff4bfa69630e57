"""Peer staging in the scheduler: it plans the copies of chunks that workers carry out.

A worker says what it needs for a context and does not have (``pcm-stage``). It is told, chunk by
chunk, where to get it (``pcm-copy``), and reports what became of it (``pcm-copied``).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from distributed.metrics import monotonic

from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.plugins.scheduler.workers import Workers
from dask_pcm.scheduling.broadcast import Broadcast, Copy


class StagingCoordinator(Service):
    """Plans which worker copies which chunk from whom.

    Attributes
    ----------
    n_copied
        Chunks that were copied, by source.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._plan = Broadcast()
        #: Lets the workers of this cluster know each other; it stands nowhere but in memory.
        self._token = secrets.token_bytes(32)
        self._servers: dict[str, tuple[str, int]] = {}
        self.n_copied: Counter[str] = Counter()

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        return {
            "pcm-serves": self.on_serves,
            "pcm-stage": self.on_stage,
            "pcm-staged": self.on_staged,
            "pcm-copied": self.on_copied,
        }

    def worker_joined(self, worker: str, member: Member) -> None:
        self._forget(worker)  # what an earlier life of it had under way
        self._workers.tell(worker, {"op": "pcm-welcome", "token": self._token})

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        self._forget(worker)

    def tick(self) -> None:
        self.dispatch()

    def on_serves(self, worker: str, host: str, port: int) -> None:
        """A worker serves chunks."""
        self._servers[worker] = (host, port)

    def on_stage(self, worker: str, blob: str, n_chunks: int, have: Iterable[int]) -> None:
        """A worker stages a blob."""
        self._plan.want(worker, blob, n_chunks, have)
        self.dispatch()

    def on_staged(self, worker: str, blob: str, n_chunks: int, is_there: bool) -> None:
        """A worker has all of a blob, or stages it no more."""
        if is_there:
            self._plan.has(worker, blob, n_chunks)
        else:
            self._plan.drop(worker, blob)
        self.dispatch()

    def on_copied(self, worker: str, blob: str, chunk: int, source: str, outcome: str) -> None:
        """A copy has ended: it was ``copied``, it ``failed``, or the chunk was ``absent``."""
        copy = Copy(worker, blob, chunk, source)
        if outcome == "copied":
            self.n_copied[source] += 1
            self._plan.copied(copy)
        else:
            self._plan.failed(copy, monotonic(), is_absent=outcome == "absent")
        self.dispatch()

    def _forget(self, worker: str) -> None:
        self._servers.pop(worker, None)
        self._plan.remove_worker(worker)
        self.dispatch()

    def dispatch(self) -> None:
        """Tell workers what to copy now."""
        for copy in self._plan.plan(monotonic()):
            at = self._servers.get(copy.source)
            says = {"blob": copy.blob, "chunk": copy.chunk, "source": copy.source, "at": at}
            self._workers.tell(copy.worker, {"op": "pcm-copy", **says})
