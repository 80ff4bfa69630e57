"""The scheduler plans peer staging; workers copy the chunks.

A worker announces a blob that it is missing chunks of (``pcm-stage``). For each chunk it gets a
source (``pcm-copy``), and it reports how the copy ended (``pcm-copied``).
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
    """Plans which worker copies which chunk from which source.

    Attributes
    ----------
    n_copied
        Number of chunks that were copied, by source.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._plan = Broadcast()
        #: Authenticates the workers of this cluster to each other; kept in memory only.
        self._token = secrets.token_bytes(32)
        self._servers: dict[str, tuple[str, int]] = {}
        self.n_copied: Counter[str] = Counter()

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """See ``Service``."""
        return {
            "pcm-serves": self.on_serves,
            "pcm-stage": self.on_stage,
            "pcm-staged": self.on_staged,
            "pcm-copied": self.on_copied,
        }

    def worker_joined(self, worker: str, member: Member) -> None:
        """See ``Service``; sends the worker the cluster's token."""
        self._forget(worker)  # copies of an earlier epoch of it will never be reported
        self._workers.tell(worker, {"op": "pcm-welcome", "token": self._token})

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        """See ``Service``."""
        self._forget(worker)

    def tick(self) -> None:
        """See ``Service``; a source that failed is tried again after its back-off."""
        self.dispatch()

    def on_serves(self, worker: str, host: str, port: int) -> None:
        """A worker serves chunks at this address."""
        self._servers[worker] = (host, port)

    def on_stage(self, worker: str, blob: str, n_chunks: int, have: Iterable[int]) -> None:
        """A worker wants a blob, of which it has some chunks."""
        self._plan.want(worker, blob, n_chunks, have)
        self.dispatch()

    def on_staged(self, worker: str, blob: str, n_chunks: int, is_there: bool) -> None:
        """A worker has all of a blob, or has stopped staging it."""
        if is_there:
            self._plan.has(worker, blob, n_chunks)
        else:
            self._plan.drop(worker, blob)
        self.dispatch()

    def on_copied(self, worker: str, blob: str, chunk: int, source: str, outcome: str) -> None:
        """A copy has ended: ``copied``, ``failed``, or ``absent`` if the source lacks the chunk."""
        copy = Copy(worker, blob, chunk, source)
        if outcome == "copied":
            self.n_copied[source] += 1
            self._plan.copied(copy)
        else:
            self._plan.failed(copy, monotonic(), is_absent=outcome == "absent")
        self.dispatch()

    def _forget(self, worker: str) -> None:
        """Drop a worker from the plan, as source and destination."""
        self._servers.pop(worker, None)
        self._plan.remove_worker(worker)
        self.dispatch()

    def dispatch(self) -> None:
        """Send the copies that can start now."""
        for copy in self._plan.plan(monotonic()):
            at = self._servers.get(copy.source)
            says = {"blob": copy.blob, "chunk": copy.chunk, "source": copy.source, "at": at}
            self._workers.tell(copy.worker, {"op": "pcm-copy", **says})
