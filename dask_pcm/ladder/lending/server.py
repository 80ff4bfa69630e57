"""The server of a process that lends: it answers borrowers, and hears what lenders say."""

from __future__ import annotations

import functools
import logging
import os
import queue
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dask_pcm.ladder.lending import wire
from dask_pcm.ladder.lending.leases import HOST, Lease, Leases
from dask_pcm.ladder.lending.loan import Loan

logger = logging.getLogger(__name__)

#: How long the end of a server is waited for.
_CLOSING_S = 5.0


class Server:
    """Answers borrowers, and hears what lenders say, on one thread.

    Attributes
    ----------
    address
        Where borrowers find it.
    is_over
        Whether it has ended.
    """

    def __init__(self, listener: socket.socket, name: str, leases: Leases) -> None:
        self._listener = listener
        self.address: str = os.fsdecode(listener.getsockname())
        self._name = name
        self._leases = leases
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        #: Leases and loans by the connections that they are.
        self._leased: dict[socket.socket, Lease | None] = {}
        self._lent: dict[socket.socket, Loan] = {}
        self._to_watch: list[tuple[socket.socket, Loan]] = []
        self._to_forget: list[socket.socket] = []
        self._to_grant: list[tuple[socket.socket, tuple[Lease, int | None] | None]] = []
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._helper: threading.Thread | None = None
        self._changing = threading.Lock()
        self.is_over = False
        self._thread = threading.Thread(target=self._serve, name="pcm-lending", daemon=True)
        self._thread.start()

    def watch(self, connection: socket.socket, loan: Loan) -> None:
        """Tell a loan once its lender wants it back, or is dead."""
        with self._changing:
            is_over = self.is_over
            if not is_over:
                self._to_watch.append((connection, loan))
        if is_over:
            loan.want_back()
        self._wake()

    def forget(self, connection: socket.socket) -> None:
        """Close a connection: its loan was closed."""
        with suppress(OSError):  # so that its lender hears it before the next request
            connection.shutdown(socket.SHUT_RDWR)
        with self._changing:
            self._to_forget.append(connection)
            if self.is_over:
                connection.close()
        self._wake()

    def close(self) -> None:
        """Close all connections, and so end all leases."""
        self.is_over = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSING_S)

    def _wake(self) -> None:
        with suppress(OSError):  # it has ended
            self._waker.send(b".")

    def _serve(self) -> None:
        try:
            while not self.is_over:
                for key, _ in self._selector.select():
                    self._on_event(key.fileobj)
                self._take_over()
        except Exception:
            logger.exception("Memory is not lent any more")
        finally:
            self._end()

    def _on_event(self, source: Any) -> None:
        if source is self._listener:
            self._accept()
        elif source is self._woken:
            self._woken.recv(4096)
        elif source in self._lent:
            self._hear_lender(source)
        elif source in self._leased:
            self._hear_borrower(source)

    def _accept(self) -> None:
        connection = wire.accept(self._listener)
        if connection is None:
            return
        self._leased[connection] = None
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear_borrower(self, connection: socket.socket) -> None:
        """A request, or the end of a lease."""
        try:
            heard = wire.receive(connection)
        except BlockingIOError:
            return
        if heard is None or self._leased[connection] is not None:
            self._hang_up(connection)
            return
        asked, _ = heard
        if asked.get("medium") == HOST:  # it is filled, and the nanny is asked: that takes longer
            self._selector.unregister(connection)
            self._later(lambda: self._grant(connection, asked, is_here=False))
        else:
            self._grant(connection, asked)

    def _grant(
        self, connection: socket.socket, asked: dict[str, Any], is_here: bool = True
    ) -> None:
        """Answer a request; on the server's thread unless not `is_here`."""
        try:
            granted = self._leases.grant(
                str(asked["medium"]),
                int(asked["n_bytes"]),
                str(asked["name"]),
                functools.partial(_ask_back, connection),
                bool(asked.get("is_fixed")),
            )
        except Exception as error:  # of another version, or of a device
            logger.info("Memory was not lent: %r", error)
            granted = None
        if is_here:
            self._granted(connection, granted)
            return
        with self._changing:
            is_over = self.is_over
            if not is_over:
                self._to_grant.append((connection, granted))
        if is_over and granted is not None:
            lease, fd = granted
            if fd is not None:
                os.close(fd)
            self._leases.end(lease)
        self._wake()

    def _granted(self, connection: socket.socket, granted: tuple[Lease, int | None] | None) -> None:
        """Tell a borrower of its lease, or that there is none."""
        if granted is None:
            wire.send(connection, {"epoch": None})
            self._hang_up(connection)
            return
        lease, fd = granted
        self._leased[connection] = lease
        is_told = wire.send(connection, {"epoch": lease.epoch, "name": self._name}, fd)
        if fd is not None:
            os.close(fd)
        if not is_told:
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()
        lease = self._leased.pop(connection, None)
        if lease is not None and lease.medium == HOST and not self.is_over:
            self._later(functools.partial(self._leases.end, lease))
        elif lease is not None:
            self._leases.end(lease)

    def _later(self, call: Callable[[], None]) -> None:
        """Call what asks the nanny, in turn, on another thread."""
        if self._helper is None:
            self._helper = threading.Thread(target=self._help, name="pcm-lend", daemon=True)
            self._helper.start()
        self._calls.put(call)

    def _help(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception:
                logger.exception("Memory that was lent may still be counted")

    def _hear_lender(self, connection: socket.socket) -> None:
        """The lender wants its memory back, or is dead."""
        loan = self._lent[connection]
        try:
            if wire.receive(connection) is None:
                self._selector.unregister(connection)  # until the loan is closed
        except BlockingIOError:
            return
        loan.want_back()

    def _take_over(self) -> None:
        """What other threads have said."""
        with self._changing:
            new, self._to_watch = self._to_watch, []
            gone, self._to_forget = self._to_forget, []
            granted, self._to_grant = self._to_grant, []
        for connection, grant in granted:
            self._selector.register(connection, selectors.EVENT_READ)
            self._granted(connection, grant)
        for connection, loan in new:
            if connection.fileno() < 0:  # closed meanwhile
                continue
            connection.setblocking(False)
            self._lent[connection] = loan
            self._selector.register(connection, selectors.EVENT_READ)
        for connection in gone:
            self._lent.pop(connection, None)
            with suppress(KeyError, ValueError):  # its lender is dead
                self._selector.unregister(connection)
            connection.close()

    def _end(self) -> None:
        with self._changing:
            self.is_over = True
        self._listener.close()
        try:
            self._take_over()
        except Exception:  # of a connection; the others end all the same
            logger.exception("A connection did not end well")
        for connection in [*self._leased]:
            self._hang_up(connection)
        for connection, loan in self._lent.items():
            connection.close()
            loan.want_back()
        self._selector.close()
        self._calls.put(None)
        for one in (self._woken, self._waker):
            one.close()


def _ask_back(connection: socket.socket) -> None:
    wire.send(connection, {"wants_back": True})
