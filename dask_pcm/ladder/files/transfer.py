"""Workers send each other chunks over separate sockets and threads, not over Dask's comms.

Dask's comms are for messages: a gigabyte through them blocks the event loop. So every worker has a
server that sends chunks from its cache with ``sendfile``, on its own threads.

Client and server authenticate each other: each proves that it knows the cluster's token with an
HMAC over two nonces. The token itself is never sent. If the cluster uses TLS, so do these
connections, with the same certificates. Received chunks are verified against their digests
(``PartialBlob.write``), so a peer can delay a transfer but cannot corrupt it.

A request is a blob, a chunk, its first byte and its length. The answer is the length (0 if the
chunk is not here) and the bytes. Requests may be pipelined.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from dask_pcm.context.bundles import MAX_CHUNK_BYTES, Blob
from dask_pcm.errors import TransferError

logger = logging.getLogger(__name__)

_NONCE_BYTES = 32
_PROOF_BYTES = 32
_REQUEST = struct.Struct("!16sIQI")  # blob, chunk, first byte, length
_ANSWER = struct.Struct("!I")
_SOCKET_BYTES = 4 << 20
#: Requests that a client sends before it reads the first answer.
_AHEAD = 3
#: A peer that sends nothing for this long is considered gone; one that accepts no connection, too.
TIMEOUT_S, CONNECT_S = 15.0, 5.0
_MAX_CONNECTIONS = 256
#: Limits for connections that have not authenticated yet: their number, and the time that each has.
_MAX_STRANGERS, _INTRODUCTION_S = 64, 5.0
#: Pause after a connection could not be accepted.
_PAUSE_S = 0.5


class ChunkSource(Protocol):
    """What a server serves from, for instance ``FileCache``; called from several threads."""

    def opened(self, digest: str, chunk: int) -> contextlib.AbstractContextManager[int | None]:
        """A descriptor of a file that has the chunk at its offset; None if it is not here."""


@dataclass(frozen=True, slots=True)
class Access:
    """The credentials of one cluster's workers.

    Attributes
    ----------
    token
        A secret that only the workers of the cluster know.
    listens, connects
        TLS contexts of the server and the client side; None if the cluster does not use TLS.
    """

    token: bytes
    listens: ssl.SSLContext | None = None
    connects: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return "<Access>"  # keeps the token out of logs

    def proof(self, who: bytes, *nonces: bytes) -> bytes:
        """The HMAC by which one side, `who`, proves that it knows the token."""
        return hmac.digest(self.token, b"|".join((who, *nonces)), "sha256")


class Server:
    """Serves chunks, on its own threads, until it is closed.

    Parameters
    ----------
    source
        The blobs to serve.
    access
        The credentials that clients need.
    host
        The interface to listen on.
    ports
        Ports to try, in order; (0,) for any free one.

    Raises
    ------
    TransferError
        If none of the ports is free.
    """

    def __init__(
        self, source: ChunkSource, access: Access, host: str, ports: Iterable[int] = (0,)
    ) -> None:
        self._source = source
        self._access = access
        self._listening = _bound(host, list(ports))
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._connections: set[socket.socket] = set()
        #: Connections that have not authenticated yet, the oldest first.
        self._strangers: dict[socket.socket, None] = {}
        self._changing = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._accept, name="pcm-serve", daemon=True).start()

    def close(self) -> None:
        """Stop listening and end all connections."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # close() alone would not wake the accepting thread
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._changing:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        """Accept connections; the target of the accepting thread."""
        while not self._is_closed:
            try:
                connection, address = self._listening.accept()
            except OSError as error:
                if not self._is_closed:  # for instance out of descriptors, which may pass
                    logger.warning("A connection could not be accepted: %s", error)
                    time.sleep(_PAUSE_S)
                continue
            with self._changing:
                is_welcome = not self._is_closed and self._has_room()
                if is_welcome:
                    self._connections.add(connection)
                    self._strangers[connection] = None
            if is_welcome:
                args = (connection, address)
                threading.Thread(
                    target=self._serve, args=args, name="pcm-serve", daemon=True
                ).start()
            else:
                connection.close()

    def _has_room(self) -> bool:
        """Whether one more may connect; closes the oldest unauthenticated ones to make room.

        So clients that know the token get in, however many others keep connections open.
        """
        while self._strangers and (
            len(self._strangers) >= _MAX_STRANGERS or len(self._connections) >= _MAX_CONNECTIONS
        ):
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self._connections.discard(oldest)
            with contextlib.suppress(OSError):  # wakes its thread, which closes it
                oldest.shutdown(socket.SHUT_RDWR)
        return len(self._connections) < _MAX_CONNECTIONS

    def _encrypted(self, connection: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        """Wrap a connection in TLS; raises TransferError if it was closed to make room."""
        stream = tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        # Before the handshake, which may take long: wrapping has detached the plain socket, so
        # only the new one can be closed from outside.
        with self._changing:
            if connection in self._strangers:
                del self._strangers[connection]
                self._connections.discard(connection)
                self._strangers[stream] = None
                self._connections.add(stream)
            else:
                stream.close()
                raise TransferError("it was closed to make room for other connections")
        stream.do_handshake()
        return stream

    def _serve(self, connection: socket.socket, address: object) -> None:
        """Serve one connection; the target of its thread."""
        stream = connection
        try:
            connection.settimeout(_INTRODUCTION_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._access.listens is not None:
                stream = self._encrypted(connection, self._access.listens)
            if self._is_known(stream):
                with self._changing:
                    self._strangers.pop(stream, None)
                stream.settimeout(TIMEOUT_S)
                while request := _received(stream, _REQUEST.size, may_end=True):
                    self._answer(stream, *_REQUEST.unpack(request))
            else:
                logger.warning("Refused %s, which does not know the cluster's token", address)
        except (OSError, TransferError) as error:
            logger.debug("A transfer to %s ended: %s", address, error)
        finally:
            stream.close()
            connection.close()
            with self._changing:
                for ended in (stream, connection):
                    self._connections.discard(ended)
                    self._strangers.pop(ended, None)

    def _is_known(self, stream: socket.socket) -> bool:
        """Authenticate a client, and this server to it; False if it does not know the token."""
        mine = secrets.token_bytes(_NONCE_BYTES)
        stream.sendall(mine)
        said = bytes(_received(stream, _NONCE_BYTES + _PROOF_BYTES))
        theirs, proof = said[:_NONCE_BYTES], said[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, self._access.proof(b"asks", mine, theirs)):
            return False
        stream.sendall(self._access.proof(b"serves", theirs, mine))
        return True

    def _answer(
        self, stream: socket.socket, digest: bytes, chunk: int, start: int, n_bytes: int
    ) -> None:
        """Answer one request."""
        if n_bytes > MAX_CHUNK_BYTES:
            raise TransferError(f"{n_bytes:,} bytes were requested, more than a chunk has")
        with self._source.opened(digest.hex(), chunk) as descriptor:
            if descriptor is None or os.fstat(descriptor).st_size < start + n_bytes:
                stream.sendall(_ANSWER.pack(0))
                return
            stream.sendall(_ANSWER.pack(n_bytes))
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                if stream.sendfile(file, start, n_bytes) < n_bytes:
                    raise TransferError("a file became shorter while it was sent")


class Peer:
    """A connection to the server of another worker; a context manager, for one thread.

    Raises
    ------
    TransferError
        If the peer is gone, does not answer, or does not know the token.
    """

    def __init__(self, address: tuple[str, int], access: Access) -> None:
        self._address = address
        self._access = access
        self._stack = contextlib.ExitStack()
        self._buffer = bytearray()

    def __enter__(self) -> Peer:
        with self._named(), contextlib.ExitStack() as stack:
            connection = socket.create_connection(self._address, CONNECT_S)
            connection.settimeout(TIMEOUT_S)
            stack.callback(connection.close)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
            self._stream: socket.socket = connection
            if self._access.connects is not None:
                self._stream = self._access.connects.wrap_socket(
                    connection, server_hostname=self._address[0]
                )
                stack.callback(self._stream.close)
            self._introduce()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    def _introduce(self) -> None:
        """Authenticate this client, and the server to it."""
        theirs = bytes(_received(self._stream, _NONCE_BYTES))
        mine = secrets.token_bytes(_NONCE_BYTES)
        self._stream.sendall(mine + self._access.proof(b"asks", theirs, mine))
        proof = bytes(_received(self._stream, _PROOF_BYTES))
        if not hmac.compare_digest(proof, self._access.proof(b"serves", mine, theirs)):
            raise TransferError("it does not know the cluster's token")

    def chunks(self, blob: Blob, wanted: Iterable[int]) -> Iterator[tuple[int, memoryview | None]]:
        """Yield the wanted chunks in order; None for a chunk that the peer does not have.

        The memory that is yielded is reused for the next chunk.
        """
        rest, asked = iter(wanted), deque[int]()
        digest = bytes.fromhex(blob.digest)
        if len(self._buffer) < blob.chunk_bytes:
            self._buffer = bytearray(blob.chunk_bytes)
        while True:
            with self._named():
                while len(asked) < _AHEAD and (chunk := next(rest, None)) is not None:
                    start, stop = blob.span(chunk)
                    self._stream.sendall(_REQUEST.pack(digest, chunk, start, stop - start))
                    asked.append(chunk)
                if not asked:
                    return
                chunk = asked.popleft()
                start, stop = blob.span(chunk)
                (n_bytes,) = _ANSWER.unpack(_received(self._stream, _ANSWER.size))
                if n_bytes not in (0, stop - start):
                    raise TransferError(
                        f"it sent {n_bytes} bytes, but {stop - start} were requested"
                    )
                found = memoryview(self._buffer)[:n_bytes] if n_bytes else None
                if found is not None:
                    _fill(self._stream, found)
            yield chunk, found

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn errors in the block into TransferErrors that name the peer."""
        host, port = self._address
        try:
            yield
        except (OSError, TransferError) as error:
            raise TransferError(f"The peer at {host}:{port} failed: {error}") from error


def _received(stream: socket.socket, n_bytes: int, may_end: bool = False) -> bytearray:
    """Receive exactly `n_bytes`; nothing if the other side has closed and `may_end`."""
    found = bytearray(n_bytes)
    first = stream.recv_into(found)
    if not first and may_end:
        return bytearray()
    _fill(stream, memoryview(found)[first:], is_begun=first > 0)
    return found


def _fill(stream: socket.socket, rest: memoryview, is_begun: bool = True) -> None:
    """Receive exactly as many bytes as `rest` has."""
    while rest:
        n_received = stream.recv_into(rest)
        if not n_received:
            raise TransferError("the connection was closed" + (" midway" if is_begun else ""))
        rest = rest[n_received:]


def _bound(host: str, ports: list[int]) -> socket.socket:
    """Listen on the first free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    error: OSError | None = None
    for port in ports:
        listening = socket.socket(family)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            listening.bind((host, port))
            listening.listen()
            return listening
        except OSError as cause:
            listening.close()
            error = cause
    raise TransferError(
        f"None of the ports {ports[0]} to {ports[-1]} is free on {host}: {error}. Set more ports in"
        " pcm.ladder.transfer.ports."
    )
