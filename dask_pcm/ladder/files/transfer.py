"""Chunks of blobs from worker to worker, on sockets and threads beside the cluster's own comms.

Dask's comms carry messages; a gigabyte through them holds up the event loop. So every worker has a
server thread, which hands chunks from its cache to the kernel (sendfile), and fetches what it needs
from the servers of others.

Who connects and who answers prove to each other that they know the cluster's token, by a keyed
digest of two random numbers (HMAC); the token itself is never sent. Where the cluster uses TLS,
these connections do, with the same certificates. What arrives is verified chunk by chunk
(``PartialBlob.write``), so a peer can delay but not deceive.

A request is a chunk's blob, first byte and length; the answer its length (0 where it is not here)
and its bytes. Requests may be sent ahead.
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
_AHEAD = 3
#: A peer that sends nothing for so long is taken for gone.
TIMEOUT_S = 15.0
_MAX_CONNECTIONS = 256
#: Connections that have not proved yet that they know the token: so many, for so long.
_MAX_STRANGERS, _INTRODUCTION_S = 64, 5.0
_PAUSE_S = 0.5


class Shelf(Protocol):
    """What a server serves from."""

    def opened(self, digest: str, chunk: int) -> contextlib.AbstractContextManager[int | None]:
        """A descriptor of a file that has the chunk at its place; None where it has not."""


@dataclass(frozen=True, slots=True)
class Access:
    """What lets workers of one cluster talk to each other.

    Attributes
    ----------
    token
        Known to the workers of a cluster alone.
    listens, connects
        Contexts of TLS, where the cluster uses it.
    """

    token: bytes
    listens: ssl.SSLContext | None = None
    connects: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return "<Access>"  # a token stands in no log

    def proof(self, who: bytes, *nonces: bytes) -> bytes:
        return hmac.digest(self.token, b"|".join((who, *nonces)), "sha256")


class Server:
    """Serves chunks, on threads of its own, until it is closed.

    Parameters
    ----------
    shelf
        What there is to serve.
    access
        Who may ask.
    host
        The interface to listen on.
    ports
        Ports to choose from, as far as they are free; (0,) for any.

    Raises
    ------
    TransferError
        Where none of the ports is free.
    """

    def __init__(
        self, shelf: Shelf, access: Access, host: str, ports: Iterable[int] = (0,)
    ) -> None:
        self._shelf = shelf
        self._access = access
        self._listening = _bound(host, list(ports))
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._connections: set[socket.socket] = set()
        #: Those that have not introduced themselves, the oldest first.
        self._strangers: dict[socket.socket, None] = {}
        self._changing = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._accept, name="pcm-serve", daemon=True).start()

    def close(self) -> None:
        """Serve nobody any more."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._changing:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, address = self._listening.accept()
            except OSError as error:
                if not self._is_closed:  # out of descriptors, say, for a moment
                    logger.warning("A peer could not be let in: %s", error)
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
        """Whether one more may connect; the oldest that have said nothing make room for it.

        So those who know the token get in, however many others hold connections open.
        """
        while self._strangers and (
            len(self._strangers) >= _MAX_STRANGERS or len(self._connections) >= _MAX_CONNECTIONS
        ):
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self._connections.discard(oldest)
            with contextlib.suppress(OSError):  # its thread sees the end
                oldest.shutdown(socket.SHUT_RDWR)
        return len(self._connections) < _MAX_CONNECTIONS

    def _encrypted(self, connection: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        stream = tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._changing:  # what was a connection is none any more
            if connection in self._strangers:
                del self._strangers[connection]
                self._connections.discard(connection)
                self._strangers[stream] = None
                self._connections.add(stream)
            else:
                stream.close()
                raise TransferError("others were let in instead")
        stream.do_handshake()
        return stream

    def _serve(self, connection: socket.socket, address: object) -> None:
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
        if n_bytes > MAX_CHUNK_BYTES:
            raise TransferError(f"{n_bytes:,} bytes were asked for, more than a chunk has")
        with self._shelf.opened(digest.hex(), chunk) as descriptor:
            if descriptor is None or os.fstat(descriptor).st_size < start + n_bytes:
                stream.sendall(_ANSWER.pack(0))
                return
            stream.sendall(_ANSWER.pack(n_bytes))
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                if stream.sendfile(file, start, n_bytes) < n_bytes:
                    raise TransferError("a file became shorter while it was sent")


class Peer:
    """A connection to the server of another worker; a context manager.

    Raises
    ------
    TransferError
        Where the peer is gone, does not answer or does not know the token.
    """

    def __init__(self, address: tuple[str, int], access: Access) -> None:
        self._address = address
        self._access = access
        self._stack = contextlib.ExitStack()
        self._buffer = bytearray()

    def __enter__(self) -> Peer:
        with self._named(), contextlib.ExitStack() as stack:
            connection = socket.create_connection(self._address, TIMEOUT_S)
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
        theirs = bytes(_received(self._stream, _NONCE_BYTES))
        mine = secrets.token_bytes(_NONCE_BYTES)
        self._stream.sendall(mine + self._access.proof(b"asks", theirs, mine))
        proof = bytes(_received(self._stream, _PROOF_BYTES))
        if not hmac.compare_digest(proof, self._access.proof(b"serves", mine, theirs)):
            raise TransferError("it does not know the cluster's token")

    def chunks(self, blob: Blob, wanted: Iterable[int]) -> Iterator[tuple[int, memoryview | None]]:
        """Chunks in the order asked for; None where the peer has not got one.

        What is yielded is valid until the next is asked for.
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
                        f"it sent {n_bytes} bytes where {stop - start} were asked for"
                    )
                found = memoryview(self._buffer)[:n_bytes] if n_bytes else None
                if found is not None:
                    _fill(self._stream, found)
            yield chunk, found

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        host, port = self._address
        try:
            yield
        except (OSError, TransferError) as error:
            raise TransferError(f"The peer at {host}:{port} failed: {error}") from error


def _received(stream: socket.socket, n_bytes: int, may_end: bool = False) -> bytearray:
    """Exactly so many bytes; none where the other side has ended, and may."""
    found = bytearray(n_bytes)
    first = stream.recv_into(found)
    if not first and may_end:
        return bytearray()
    _fill(stream, memoryview(found)[first:], is_begun=first > 0)
    return found


def _fill(stream: socket.socket, rest: memoryview, is_begun: bool = True) -> None:
    while rest:
        n_received = stream.recv_into(rest)
        if not n_received:
            raise TransferError("the connection was closed" + (" in the midst" if is_begun else ""))
        rest = rest[n_received:]


def _bound(host: str, ports: list[int]) -> socket.socket:
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
        f"None of the ports {ports[0]} to {ports[-1]} is free on {host}: {error}. Give more of them"
        " in pcm.ladder.transfer.ports."
    )
