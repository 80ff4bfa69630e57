"""A worker's part in lending on its host: it lends what it can spare, and borrows what it needs."""

from __future__ import annotations

import functools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from dask_pcm.ladder.lending import wire
from dask_pcm.ladder.lending.leases import HOST, Lease, Leases
from dask_pcm.ladder.lending.loan import Loan

logger = logging.getLogger(__name__)

#: After lenders had nothing, none is asked for the same for this long.
_REST_S = 1.0
#: What a process takes on a device beside what it allocates there, once it has used it.
_CUDA_CONTEXT_BYTES = 512 << 20


class Lending:
    """Lends memory of this process to its neighbours, and borrows theirs. For any thread.

    A thread of its own answers neighbours. Until ``open`` it only lends to this process.

    Parameters
    ----------
    leases
        What this process lends.
    devices
        Devices on which this process can take memory: their names, as lenders call them, and for
        torch here.
    on_borrowed
        Told how many bytes of memory this process may use beside its own, before it does.
    """

    def __init__(
        self,
        leases: Leases,
        devices: Callable[[], Mapping[str, str]] = dict,
        on_borrowed: Callable[[int], None] = lambda n_bytes: None,
    ) -> None:
        self.leases = leases
        self._devices = devices
        self._on_borrowed = on_borrowed
        self._cluster = self._name = ""
        self._changing = threading.Lock()
        self._telling = threading.Lock()
        #: What this process has borrowed.
        self._loans: set[Loan] = set()
        #: Connections to lenders on whose devices this process has a context, by address.
        self._contexts: dict[tuple[str, str], socket.socket] = {}
        #: Until when no lender is asked for a medium, by the monotonic clock.
        self._rests: dict[str, float] = {}
        self._server: _Server | None = None

    def open(self, cluster: str, name: str) -> None:
        """Lend to workers of a cluster on this host, and borrow from them.

        Parameters
        ----------
        cluster
            A text that all workers of the cluster know, and no others.
        name
            Of this worker, for messages.
        """
        self._name = name
        if self._server is not None:  # of a cluster that was
            self._server.close()
        try:
            self._server = _Server(wire.listen(cluster), name, self.leases)
        except OSError as error:  # not Linux
            logger.info("Memory is not lent: %s", error)
            return
        self._cluster = cluster

    @property
    def borrowed_bytes(self) -> int:
        """What this process has borrowed now, of its own device too."""
        with self._changing:
            return sum(loan.n_bytes for loan in self._loans)

    def borrow(self, rung: str, n_bytes: int) -> Loan | None:
        """Borrow memory; None if nothing is to be had. Blocks for some milliseconds.

        Parameters
        ----------
        rung : {"device", "neighbour", "host"}
            Of devices, what this worker has to spare itself comes first; or only of those of
            neighbours; or of the host's memory that neighbours have to spare.
        """
        if rung == HOST:
            found = self._of_others(HOST, n_bytes)
        else:
            found = self._of_device(n_bytes, is_own=rung == "device")
        if found is not None:
            with self._changing:
                self._loans.add(found)
            self._tell()
            logger.debug("%s lends %s %s bytes of %s", found.lender, self._name, n_bytes, rung)
        return found

    def close(self) -> None:
        """Lend and borrow nothing more; what is borrowed is wanted back at once."""
        self._cluster = ""
        if self._server is not None:
            self._server.close()
        with self._changing:
            loans, contexts = list(self._loans), list(self._contexts.values())
            self._contexts.clear()
        for loan in loans:
            loan.want_back()
        for connection in contexts:
            connection.close()
        self.leases.close()

    def _of_device(self, n_bytes: int, is_own: bool) -> Loan | None:
        for medium, device in self._devices().items():
            loan = self._of_self(medium, n_bytes, device) if is_own else None
            loan = loan or self._of_others(medium, n_bytes, device)
            if loan is None:
                continue
            try:
                loan.memory()
                return loan
            except (
                RuntimeError
            ) as error:  # the budget is right, and the device is full all the same
                logger.info("A device has no %s bytes that its worker lends: %s", n_bytes, error)
                loan.close()
        return None

    def _of_self(self, medium: str, n_bytes: int, device: str) -> Loan | None:
        """What the device of this worker has to spare."""
        found: list[Loan] = []
        asks_back = threading.Event()

        def ask_back() -> None:
            asks_back.set()
            for loan in found:
                loan.want_back()

        granted = self.leases.grant(medium, n_bytes, self._name or "itself", ask_back, is_own=True)
        if granted is None:
            return None
        lease, _ = granted
        loan = Loan(lease.epoch, medium, n_bytes, self._name or "itself", device=device)
        loan.ends_with(lambda: self._ended(loan, lambda: self.leases.end(lease)))
        found.append(loan)
        if asks_back.is_set():  # in between
            loan.want_back()
        return loan

    def _of_others(self, medium: str, n_bytes: int, device: str | None = None) -> Loan | None:
        """What a neighbour lends."""
        server = self._server
        if not self._cluster or server is None or time.monotonic() < self._rests.get(medium, 0.0):
            return None
        for address in wire.lenders(self._cluster):
            if address == server.address:
                continue
            beside = _CUDA_CONTEXT_BYTES if device is not None and device != "cpu" else 0
            if beside and not self._has_context(address, medium, beside):
                continue
            loan = self._asked(server, address, medium, n_bytes, device)
            if loan is not None:
                return loan
        self._rests[medium] = time.monotonic() + _REST_S
        return None

    def _has_context(self, address: str, medium: str, n_bytes: int) -> bool:
        """Have the lender count what this process takes on its device as soon as it uses that.

        For as long as this process lives.
        """
        if (address, medium) in self._contexts:
            return True
        connection = wire.connect(address)
        if connection is None:
            return False
        says = {"medium": medium, "n_bytes": n_bytes, "name": self._name, "is_fixed": True}
        if wire.send(connection, says):
            answer = wire.receive(connection)
            if answer is not None and answer[0].get("epoch") is not None:
                self._contexts[address, medium] = connection
                return True
        connection.close()
        return False

    def _asked(
        self, server: _Server, address: str, medium: str, n_bytes: int, device: str | None
    ) -> Loan | None:
        connection = wire.connect(address)
        if connection is None:
            return None
        says = {"medium": medium, "n_bytes": n_bytes, "name": self._name}
        answer = wire.receive(connection) if wire.send(connection, says) else None
        if answer is None or answer[0].get("epoch") is None:
            connection.close()
            return None
        told, fd = answer
        loan = Loan(told["epoch"], medium, n_bytes, told["name"], fd=fd, device=device)
        loan.ends_with(lambda: self._ended(loan, lambda: server.forget(connection)))
        server.watch(connection, loan)
        return loan

    def _ended(self, loan: Loan, end: Callable[[], None]) -> None:
        """A loan was closed."""
        with self._changing:
            self._loans.discard(loan)
        end()
        self._tell()

    def _tell(self) -> None:
        with self._telling:  # the last message carries the last number
            self._on_borrowed(self.borrowed_bytes)


def _ask_back(connection: socket.socket) -> None:
    wire.send(connection, {"wants_back": True})


class _Server:
    """Answers borrowers, and hears what lenders say, on one thread.

    Attributes
    ----------
    address
        Where borrowers find it.
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
        self._changing = threading.Lock()
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, name="pcm-lending", daemon=True)
        self._thread.start()

    def watch(self, connection: socket.socket, loan: Loan) -> None:
        """Tell a loan once its lender wants it back, or is dead."""
        with self._changing:
            self._to_watch.append((connection, loan))
        self._wake()

    def forget(self, connection: socket.socket) -> None:
        """Close a connection: its loan was closed."""
        with suppress(OSError):  # so that its lender hears it before the next request
            connection.shutdown(socket.SHUT_RDWR)
        with self._changing:
            self._to_forget.append(connection)
            if self._is_over:
                connection.close()
        self._wake()

    def close(self) -> None:
        """Close all connections, and so end all leases."""
        self._is_over = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(wire.ANSWER_S)

    def _wake(self) -> None:
        with suppress(OSError):  # it has ended
            self._waker.send(b".")

    def _serve(self) -> None:
        try:
            while not self._is_over:
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
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the borrower is gone, or this process has too many files open
            return
        if not wire.is_of_this_user(connection):
            connection.close()
            return
        connection.setblocking(False)
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
        try:
            granted = self._leases.grant(
                str(asked["medium"]),
                int(asked["n_bytes"]),
                str(asked["name"]),
                functools.partial(_ask_back, connection),
                bool(asked.get("is_fixed")),
            )
        except (KeyError, ValueError):  # of another version
            granted = None
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
        self._selector.unregister(connection)
        connection.close()
        lease = self._leased.pop(connection)
        if lease is not None:
            self._leases.end(lease)

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
        for connection, loan in new:
            connection.setblocking(False)
            self._lent[connection] = loan
            self._selector.register(connection, selectors.EVENT_READ)
        for connection in gone:
            self._lent.pop(connection, None)
            with suppress(KeyError, ValueError):  # its lender is dead
                self._selector.unregister(connection)
            connection.close()

    def _end(self) -> None:
        self._is_over = True
        self._take_over()
        for connection in [*self._leased]:
            self._hang_up(connection)
        for connection, loan in self._lent.items():
            connection.close()
            loan.want_back()
        self._selector.close()
        for one in (self._listener, self._woken, self._waker):
            one.close()
