"""Workers serve the blobs on their disks to each other, and copy chunks as the scheduler plans.

Chunks go from worker to worker over separate sockets (``ladder/files/transfer.py``), or over Dask's
comms where those sockets cannot be reached. The plan is made in ``plugins/scheduler/staging.py``.
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
from dask_pcm.ladder.files.transfer import CONNECT_S, TIMEOUT_S, Access, Peer, Server
from dask_pcm.scheduling.broadcast import STORE

logger = logging.getLogger(__name__)

#: If no copy ends for this long, a worker reads the rest from the store by itself.
PATIENCE_S = 30.0
#: Connections that a copying thread keeps open.
_MAX_PEERS = 8
#: The back-off after a server could not be reached.
_REST_S = 60.0
#: A worker that has reached no peer yet, and has tried so often in vain, reads from the store alone
#: for this long: a firewall lets it reach the scheduler and nothing else.
_N_UNREACHED, _APART_S = 2, 600.0


class _UnreachableError(TransferError):
    """A peer can be reached neither at its server nor over Dask's comms."""


class _Staging:
    """A blob that is being staged: one thread waits for it, copying threads write its chunks."""

    def __init__(self, file: BundledFile, filling: PartialBlob) -> None:
        self.file = file
        self.filling = filling
        self.error: PCMError | None = None
        self._changed = threading.Condition()
        self._n_writing = self._n_ended = 0
        self._is_over = self._is_given_up = False

    @contextlib.contextmanager
    def writing(self) -> Any:
        """Keep the file open within the block; yield False if staging is over already."""
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
        """A copy has ended, successfully or not: wake the thread that waits."""
        with self._changed:
            self._n_ended += 1
            self._changed.notify_all()

    def give_up(self) -> None:
        """No more copies are worth waiting for."""
        with self._changed:
            self._is_given_up = True
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until the blob is complete, a copy failed for good, or none has ended for long."""
        with self._changed:
            seen = -1
            while self._is_needed and seen != self._n_ended:
                seen = self._n_ended
                self._changed.wait_for(self._is_news(seen), PATIENCE_S)
            # A late copy must not write any more: the caller closes the file next.
            self._is_over = True
            self._changed.wait_for(lambda: not self._n_writing)

    def _is_news(self, seen: int) -> Callable[[], bool]:
        """A predicate: whether more copies than `seen` have ended."""
        return lambda: self._n_ended != seen or self._is_given_up

    @property
    def _is_needed(self) -> bool:
        return bool(self.filling.missing) and self.error is None and not self._is_given_up


class Fetcher:
    """Serves and fetches chunks for one worker.

    Parameters
    ----------
    worker
        The worker whose comms and certificates are used.
    disk
        Returns the file cache of this host.
    tell
        Sends a message to the scheduler; may be called from any thread.
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
        self._own = threading.local()  # each copying thread's connections
        #: When the back-off of each server that could not be reached ends, by the monotonic clock.
        self._unreachable: dict[tuple[str, int], float] = {}
        #: Peers that could not be reached in any way, and when; and whether any could ever be.
        self._unreached: set[tuple[str, float]] = set()
        self._has_reached = False
        self._apart_until = 0.0
        self._opening = threading.Lock()
        worker.handlers["pcm_chunk"] = self.give

    def on_welcome(self, token: bytes) -> None:
        """The gate, perhaps a new one, has sent the cluster's token; on the event loop."""
        security = self._worker.security
        listens = security.get_listen_args("worker").get("ssl_context")
        connects = security.get_connection_args("worker").get("ssl_context")
        with self._opening:
            before, self._server = self._server, None
            self._is_serving = False
            self._access = Access(token, listens, connects)
        if before is not None:  # it checks for the former token
            before.close()

    def close(self) -> None:
        """Stop serving and copying."""
        self._access = None
        self._worker.handlers.pop("pcm_chunk", None)
        self._copiers.shutdown(wait=False)
        if self._server is not None:
            self._server.close()

    # -- serving ----------------------------------------------------------------------------

    def staged(self, blob: Blob, is_there: bool = True) -> None:
        """Report that a blob is on this host's disk, or could not be staged; for any thread."""
        if self._access is None:
            return
        if is_there:
            self._serve()
        says = {"blob": blob.digest, "n_chunks": blob.n_chunks, "is_there": is_there}
        self._tell({"op": "pcm-staged", **says})

    def _serve(self) -> None:
        """Start the server; called when there is a blob to serve, for the first one only."""
        with self._opening:
            if self._is_serving or self._access is None:
                return
            self._is_serving = True
            host = get_address_host(self._worker.address)
            try:
                self._server = Server(self._disk(), self._access, host, self._config.ports)
            except TransferError as error:
                logger.warning("%s Peers get chunks over Dask's comms instead.", error)
                return
        self._tell({"op": "pcm-serves", "host": host, "port": self._server.address[1]})

    async def give(self, blob: str, chunk: int, start: int, n_bytes: int) -> bytes | None:
        """Return a chunk over Dask's comms, for peers that cannot reach the server.

        None if the chunk is not here, or if the request is not one that a peer would send.
        """
        if not (is_digest(blob) and start >= 0 and 0 <= n_bytes <= MAX_CHUNK_BYTES):
            logger.warning("Refused a request for %r bytes of %.80r: no chunk", n_bytes, blob)
            return None

        def read() -> bytes | None:
            with self._disk().opened(blob, chunk) as descriptor:
                return None if descriptor is None else os.pread(descriptor, n_bytes, start)

        return await asyncio.to_thread(read)  # the disk may be slow: not on the event loop

    # -- fetching ---------------------------------------------------------------------------

    def fetch(self, file: BundledFile, filling: PartialBlob) -> None:
        """Fetch the missing chunks of a file as the scheduler plans; blocks, for any thread.

        Without a plan, or if peers cannot be reached or no chunk arrives for long, they are read
        from the store.

        Raises
        ------
        StageError, DiskError
            See ``ladder.files.staging.fetch``.
        """
        is_planned = self._access is not None and time.monotonic() >= self._apart_until
        if is_planned and filling.missing:
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
                if time.monotonic() >= self._apart_until:
                    logger.warning(
                        "No chunk of %s has arrived for %g s: reading the rest from the store",
                        redacted(file.url),
                        PATIENCE_S,
                    )
                self.staged(file.blob, is_there=False)
        fetch(file, filling, self._config.store_timeout_s)

    def on_copy(self, blob: str, chunk: int, source: str, at: Sequence[Any] | None) -> None:
        """The scheduler names a source for a chunk; on the event loop."""
        self._copiers.submit(self._copy, blob, chunk, source, at)

    def _copy(self, blob: str, chunk: int, source: str, at: Sequence[Any] | None) -> None:
        """Copy a chunk and report the outcome; on a copying thread."""
        outcome, staging = "failed", self._staging.get(blob)
        if staging is None:
            return  # no longer staged, which the scheduler knows from `staged`
        try:
            outcome = self._copied(staging, chunk, source, at)
        except (StageError, DiskError) as error:
            outcome, staging.error = "absent", error  # "failed" would put the source on back-off
        except _UnreachableError as error:
            self._note_unreached(source, error)
        except Exception as error:  # fsspec's stores raise errors of their own
            logger.info(
                "Chunk %s of %s not copied from %s: %s", chunk, blob, source, redacted(str(error))
            )
        says = {"blob": blob, "chunk": chunk, "source": source, "outcome": outcome}
        self._tell({"op": "pcm-copied", **says})
        staging.news()

    def _note_unreached(self, peer: str, error: _UnreachableError) -> None:
        """A peer cannot be reached; after some, go on without peers."""
        # A peer that refuses may have ended; one that does not answer is behind something.
        is_silent = isinstance(error.__cause__, TimeoutError)
        self._unreached.add((peer, time.monotonic() if is_silent else 0.0))
        is_apart = time.monotonic() < self._apart_until
        if self._has_reached or is_apart or len(self._unreached) < _N_UNREACHED:
            return
        self._apart_until = time.monotonic() + _APART_S
        logger.warning(
            "Other workers cannot be reached (%s); is there a firewall between them? Files are read"
            " from their store for the next %g min",
            error,
            _APART_S / 60,
        )
        for staging in list(self._staging.values()):
            staging.give_up()

    def _copied(self, staging: _Staging, chunk: int, source: str, at: Sequence[Any] | None) -> str:
        """Copy a chunk from the store or a peer; return the outcome.

        Raises
        ------
        StageError, DiskError
            If the store cannot be read or has changed, or if the disk is full.
        """
        file = staging.file
        found: bytes | memoryview | None
        if source == STORE:
            try:
                found = read_chunk(file, chunk, self._config.store_timeout_s)
            except Exception as error:  # fsspec's stores raise errors of their own
                raise StageError(unreadable(file, error)) from error
        else:
            found = self._from_peer(file.blob, chunk, source, at)
        if source != STORE:
            self._has_reached = True
        if found is None:
            return "absent"
        with staging.writing() as is_open:
            if not is_open:
                return "failed"
            if staging.filling.write(chunk, found):
                return "copied"
        if source == STORE:
            raise StageError(changed(file))
        logger.warning("%s sent a chunk of %s with a wrong digest; dropped", source, file.name)
        return "failed"

    def _from_peer(
        self, blob: Blob, chunk: int, source: str, at: Sequence[Any] | None
    ) -> bytes | memoryview | None:
        """Get a chunk from a peer's server, or over Dask's comms; None if the peer lacks it."""
        if at is not None:
            place = (str(at[0]), int(at[1]))
            if time.monotonic() > self._unreachable.get(place, 0.0):
                is_new = place not in self._peers
                try:
                    return self._asked(place, blob, chunk)
                except TransferError:
                    if is_new and place not in self._unreachable:
                        raise
                    # The peer closes connections that were idle for long: open a new one.
                    if not is_new:
                        return self._asked(place, blob, chunk)
        start, stop = blob.span(chunk)
        says = {"blob": blob.digest, "chunk": chunk, "start": start, "n_bytes": stop - start}
        asked = self._over_comms(source, says)
        asking = asyncio.run_coroutine_threadsafe(asked, self._worker.loop.asyncio_loop)
        try:
            answer: bytes | None = asking.result(TIMEOUT_S)
        except OSError as error:  # a timeout, or a connection that is refused
            asking.cancel()
            raise _UnreachableError(f"{source}: {error or 'no answer'}") from error
        return answer

    async def _over_comms(self, source: str, says: dict[str, Any]) -> bytes | None:
        """Get a chunk over Dask's comms."""
        pool = self._worker.rpc
        comm = await asyncio.wait_for(pool.connect(source), CONNECT_S)  # Dask's own limit is 30 s
        pool.reuse(source, comm)
        answer: bytes | None = await pool(source).pcm_chunk(**says)
        return answer

    @property
    def _peers(self) -> dict[tuple[str, int], Peer]:
        """The calling thread's connections, by address."""
        if not hasattr(self._own, "peers"):
            self._own.peers = {}
        found: dict[tuple[str, int], Peer] = self._own.peers
        return found

    def _asked(self, place: tuple[str, int], blob: Blob, chunk: int) -> memoryview | None:
        """Get a chunk over a connection that stays open for the next one."""
        assert self._access is not None
        if place not in self._peers:
            while len(self._peers) >= _MAX_PEERS:
                self._peers.pop(next(iter(self._peers))).__exit__()
            try:
                self._peers[place] = Peer(place, self._access).__enter__()
            except TransferError as error:
                logger.info("%s; using Dask's comms for %g s", error, _REST_S)
                self._unreachable[place] = time.monotonic() + _REST_S
                raise
        try:
            ((_, found),) = self._peers[place].chunks(blob, [chunk])
            return found
        except TransferError:
            self._peers.pop(place).__exit__()
            raise
