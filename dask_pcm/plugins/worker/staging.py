"""Peer staging on a worker: it serves what is on its disk, and copies chunks as it is told.

Bytes go from worker to worker on sockets of their own (``ladder/files/transfer.py``). Where those
cannot be reached, they go over the workers' own comms. ``plugins/scheduler/staging.py`` plans.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from distributed import Worker
from distributed.comm import get_address_host
from distributed.threadpoolexecutor import ThreadPoolExecutor

from dask_pcm.config import Config
from dask_pcm.context.bundles import MAX_CHUNK_BYTES, Blob, BundledFile
from dask_pcm.errors import DiskError, PCMError, StageError, TransferError, redacted
from dask_pcm.ladder.files.cache import FileCache, is_digest
from dask_pcm.ladder.files.partial import PartialBlob
from dask_pcm.ladder.files.staging import changed, fetch, read_chunk, unreadable
from dask_pcm.ladder.files.transfer import TIMEOUT_S, Access, Peer, Server
from dask_pcm.scheduling.broadcast import STORE

logger = logging.getLogger(__name__)

#: Without a chunk for so long, a worker helps itself from the store.
PATIENCE_S = 30.0
#: Connections that a copier keeps.
_MAX_PEERS = 8
#: For so long a server that cannot be reached is not tried again.
_REST_S = 60.0


class _Staging:
    """A blob that is being staged here; copies of its chunks come and go."""

    def __init__(self, file: BundledFile, filling: PartialBlob) -> None:
        self.file = file
        self.filling = filling
        self.error: PCMError | None = None
        self._changed = threading.Condition()
        self._n_writing = self._n_ended = 0
        self._is_over = False

    @contextlib.contextmanager
    def writing(self) -> Any:
        """Keeps the file open; yields False where it is not staged any more."""
        with self._changed:
            is_open = not self._is_over
            self._n_writing += is_open
        try:
            yield is_open
        finally:
            with self._changed:
                self._n_writing -= is_open
                self._changed.notify_all()

    def news(self) -> None:
        """A copy has ended, whatever way."""
        with self._changed:
            self._n_ended += 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Until all is there, something is wrong, or nothing has happened for long."""
        with self._changed:
            seen = -1
            while self.filling.missing and self.error is None and seen != self._n_ended:
                seen = self._n_ended
                self._changed.wait_for(self._is_news(seen), PATIENCE_S)
            self._is_over = True
            self._changed.wait_for(lambda: not self._n_writing)

    def _is_news(self, seen: int) -> Callable[[], bool]:
        return lambda: self._n_ended != seen


class Fetcher:
    """A worker's end: serves what is on its disk, and copies what it is told to.

    Parameters
    ----------
    worker
        Whose comms and certificates are used.
    disk
        Opens the cache of this host.
    tell
        Sends a message to the scheduler; from any thread.
    """

    def __init__(
        self,
        worker: Worker,
        config: Config,
        disk: Callable[[], FileCache],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._worker = worker
        self._config = config
        self._disk = disk
        self._tell = tell
        self._access: Access | None = None
        self._server: Server | None = None
        self._is_serving = False
        self._staging: dict[str, _Staging] = {}
        self._copiers = ThreadPoolExecutor(2, thread_name_prefix="pcm-copy")
        self._own = threading.local()  # connections of each copier
        #: Until when servers that could not be reached are not tried again.
        self._unreachable: dict[tuple[str, int], float] = {}
        self._opening = threading.Lock()
        worker.handlers["pcm_chunk"] = self.give

    def on_welcome(self, token: bytes) -> None:
        """The cluster's token, perhaps of a new gate; on the event loop."""
        security = self._worker.security
        listens = security.get_listen_args("worker").get("ssl_context")
        connects = security.get_connection_args("worker").get("ssl_context")
        with self._opening:
            before, self._server = self._server, None
            self._is_serving = False
            self._access = Access(token, listens, connects)
        if before is not None:  # it knows another token
            before.close()

    def close(self) -> None:
        """Serve and copy no more."""
        self._access = None
        self._worker.handlers.pop("pcm_chunk", None)
        self._copiers.shutdown(wait=False)
        if self._server is not None:
            self._server.close()

    # -- serving ----------------------------------------------------------------------------

    def staged(self, blob: Blob, is_there: bool = True) -> None:
        """A blob is on this host's disk, or could not be staged; on any thread."""
        if self._access is None:
            return
        if is_there:
            self._serve()
        says = {"blob": blob.digest, "n_chunks": blob.n_chunks, "is_there": is_there}
        self._tell({"op": "pcm-staged", **says})

    def _serve(self) -> None:
        """Listen, once there is something to serve."""
        with self._opening:
            if self._is_serving or self._access is None:
                return
            self._is_serving = True
            host = get_address_host(self._worker.address)
            try:
                self._server = Server(self._disk(), self._access, host, self._config.ports)
            except TransferError as error:
                logger.warning("%s Peers get chunks over this worker's own comms.", error)
                return
        self._tell({"op": "pcm-serves", "host": host, "port": self._server.address[1]})

    async def give(self, blob: str, chunk: int, start: int, n_bytes: int) -> bytes | None:
        """A chunk over this worker's own comms, for peers that reach nothing else.

        None where it is not here; and where no peer of ours would ask for that.
        """
        if not (is_digest(blob) and start >= 0 and 0 <= n_bytes <= MAX_CHUNK_BYTES):
            logger.warning("Refused a request for %r bytes of %.80r: no chunk", n_bytes, blob)
            return None

        def read() -> bytes | None:
            with self._disk().opened(blob, chunk) as descriptor:
                return None if descriptor is None else os.pread(descriptor, n_bytes, start)

        return await asyncio.to_thread(read)

    # -- fetching ---------------------------------------------------------------------------

    def fetch(self, file: BundledFile, filling: PartialBlob) -> None:
        """Have what is missing of a file copied here, from wherever it is best had.

        Raises
        ------
        StageError, DiskError
            As ``ladder.staging.fetch``.
        """
        if self._access is not None and filling.missing:
            self._serve()
            staging = self._staging[file.blob.digest] = _Staging(file, filling)
            blob, n_chunks = file.blob.digest, file.blob.n_chunks
            have = sorted(filling.have)
            self._tell({"op": "pcm-stage", "blob": blob, "n_chunks": n_chunks, "have": have})
            try:
                staging.wait()
            finally:
                del self._staging[file.blob.digest]
            if staging.error is not None:
                self.staged(file.blob, is_there=False)
                raise staging.error
            if filling.missing:
                logger.warning(
                    "No chunk of %s has come for long: reading it here", redacted(file.url)
                )
                self.staged(file.blob, is_there=False)
        fetch(file, filling, self._config.store_timeout_s)

    def on_copy(self, blob: str, chunk: int, source: str, at: Sequence[Any] | None) -> None:
        """The scheduler says where to get a chunk; on the event loop."""
        self._copiers.submit(self._copy, blob, chunk, source, at)

    def _copy(self, blob: str, chunk: int, source: str, at: Sequence[Any] | None) -> None:
        outcome, staging = "failed", self._staging.get(blob)
        if staging is None:
            return  # the scheduler has been told
        try:
            outcome = self._copied(staging, chunk, source, at)
        except (StageError, DiskError) as error:
            outcome, staging.error = "absent", error  # no source is to blame
        except Exception as error:  # a store's own errors, too
            logger.info(
                "Chunk %s of %s not copied from %s: %s", chunk, blob, source, redacted(str(error))
            )
        says = {"blob": blob, "chunk": chunk, "source": source, "outcome": outcome}
        self._tell({"op": "pcm-copied", **says})
        staging.news()

    def _copied(self, staging: _Staging, chunk: int, source: str, at: Sequence[Any] | None) -> str:
        file = staging.file
        found: bytes | memoryview | None
        if source == STORE:
            try:
                found = read_chunk(file, chunk, self._config.store_timeout_s)
            except Exception as error:  # each store has its own
                raise StageError(unreadable(file, error)) from error
        else:
            found = self._from_peer(file.blob, chunk, source, at)
        if found is None:
            return "absent"
        with staging.writing() as is_open:
            if not is_open:
                return "failed"
            if staging.filling.write(chunk, found):
                return "copied"
        if source == STORE:
            raise StageError(changed(file))
        logger.warning("%s sent a wrong chunk of %s; it was dropped", source, file.name)
        return "failed"

    def _from_peer(
        self, blob: Blob, chunk: int, source: str, at: Sequence[Any] | None
    ) -> bytes | memoryview | None:
        if at is not None:
            place = (str(at[0]), int(at[1]))
            if time.monotonic() > self._unreachable.get(place, 0.0):
                is_new = place not in self._peers
                try:
                    return self._asked(place, blob, chunk)
                except TransferError:
                    if is_new and place not in self._unreachable:
                        raise
                    if not is_new:  # it had been idle for long
                        return self._asked(place, blob, chunk)
        start, stop = blob.span(chunk)
        asked = self._worker.rpc(source).pcm_chunk(
            blob=blob.digest, chunk=chunk, start=start, n_bytes=stop - start
        )
        loop = self._worker.loop.asyncio_loop
        answer: bytes | None = asyncio.run_coroutine_threadsafe(asked, loop).result(TIMEOUT_S)
        return answer

    @property
    def _peers(self) -> dict[tuple[str, int], Peer]:
        """Connections of the calling thread."""
        if not hasattr(self._own, "peers"):
            self._own.peers = {}
        found: dict[tuple[str, int], Peer] = self._own.peers
        return found

    def _asked(self, place: tuple[str, int], blob: Blob, chunk: int) -> memoryview | None:
        """A chunk over a connection that is kept for the next."""
        assert self._access is not None
        if place not in self._peers:
            while len(self._peers) >= _MAX_PEERS:
                self._peers.pop(next(iter(self._peers))).__exit__()
            try:
                self._peers[place] = Peer(place, self._access).__enter__()
            except TransferError as error:
                logger.info("%s; for a while chunks come over Dask's comms instead", error)
                self._unreachable[place] = time.monotonic() + _REST_S
                raise
        try:
            ((_, found),) = self._peers[place].chunks(blob, [chunk])
            return found
        except TransferError:
            self._peers.pop(place).__exit__()
            raise
