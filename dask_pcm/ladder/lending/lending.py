"""A worker's part in lending on its host: it lends what it can spare, and borrows what it needs."""

from __future__ import annotations

import functools
import logging
import os
import queue
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

#: After lenders had nothing, none is asked for as much for this long; and one that did not answer,
#: perhaps since its process is stopped, for nothing for longer.
_REST_S, _SILENT_S = 1.0, 60.0
#: How long an answer is waited for, and longer for each byte of the host, which is filled first.
_ANSWER_S, _FILL_S = 0.5, 1.0 / (1 << 30)
#: How long the end of a server is waited for.
_CLOSING_S = 5.0
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
        Told how many bytes of the host's memory this process may use beside its own, before it
        does.
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
        #: Until when no lender is asked for as many bytes of a medium, by the monotonic clock.
        self._rests: dict[str, tuple[float, int]] = {}
        #: Until when lenders that did not answer are left alone.
        self._silent: dict[str, float] = {}
        self._server: _Server | None = None
        self._opening = threading.Lock()
        self._is_closed = False
        self._told_bytes = 0

    def open(self, cluster: str, name: str) -> None:
        """Lend to workers of a cluster on this host, and borrow from them; may block for seconds.

        Parameters
        ----------
        cluster
            A text that all workers of the cluster know, and no others.
        name
            Of this worker, for messages.
        """
        with self._opening:
            is_open = self._server is not None and not self._server.is_over
            if self._is_closed or (is_open and cluster == self._cluster):
                return
            self._name, self._cluster = name, ""
            before, self._server = self._server, None
            if before is not None:  # of a cluster that was
                before.close()
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

    def borrow(self, rung: str, n_bytes: int, is_mapped: bool = True) -> Loan | None:
        """Borrow memory; None if nothing is to be had. Blocks for some milliseconds.

        Parameters
        ----------
        rung : {"device", "neighbour", "host"}
            Of devices, what this worker has to spare itself comes first; or only of those of
            neighbours; or of the host's memory that neighbours have to spare.
        is_mapped
            See ``Loan``.
        """
        if rung == HOST:
            found = self._of_others(HOST, n_bytes, is_mapped=is_mapped)
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
        with self._opening:  # it may be opened at this moment
            self._is_closed, self._cluster = True, ""
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

    def _of_others(
        self, medium: str, n_bytes: int, device: str | None = None, is_mapped: bool = True
    ) -> Loan | None:
        """What a neighbour lends."""
        server, now = self._server, time.monotonic()
        if not self._cluster or server is None or server.is_over:
            return None
        until, refused_bytes = self._rests.get(medium, (0.0, 0))
        if now < until and n_bytes >= refused_bytes:
            return None
        for address in wire.lenders(self._cluster):
            if address == server.address or now < self._silent.get(address, 0.0):
                continue
            loan = self._asked(server, address, medium, n_bytes, device, is_mapped)
            if loan is None:
                continue
            if device not in (None, "cpu") and not self._has_context(address, medium):
                loan.close()
                continue
            return loan
        self._rests[medium] = time.monotonic() + _REST_S, n_bytes
        return None

    def _has_context(self, address: str, medium: str) -> bool:
        """Have the lender count what this process takes on its device as soon as it uses that.

        For as long as this process lives.
        """
        if (address, medium) in self._contexts:
            return True
        says = {"medium": medium, "n_bytes": _CUDA_CONTEXT_BYTES, "is_fixed": True}
        answered = self._answer(address, says, _ANSWER_S)
        if answered is None:
            return False
        for gone in [one for one in self._contexts if one[0] not in wire.lenders(self._cluster)]:
            self._contexts.pop(gone).close()
        self._contexts[address, medium] = answered[0]
        return True

    def _answer(
        self, address: str, says: dict[str, Any], timeout_s: float
    ) -> tuple[socket.socket, dict[str, Any], int | None] | None:
        """A connection to a lender that grants what is asked, and what it says."""
        connection = wire.connect(address, timeout_s)
        if connection is None:
            return None
        begun = time.monotonic()
        is_told = wire.send(connection, {**says, "name": self._name})
        answer = wire.receive(connection) if is_told else None
        if answer is None and time.monotonic() - begun >= timeout_s:
            self._silent[address] = time.monotonic() + _SILENT_S
        if answer is None or answer[0].get("epoch") is None:
            connection.close()
            return None
        return connection, *answer

    def _asked(
        self,
        server: _Server,
        address: str,
        medium: str,
        n_bytes: int,
        device: str | None,
        is_mapped: bool,
    ) -> Loan | None:
        timeout_s = _ANSWER_S + (_FILL_S * n_bytes if medium == HOST else 0.0)
        answered = self._answer(address, {"medium": medium, "n_bytes": n_bytes}, timeout_s)
        if answered is None:
            return None
        connection, told, fd = answered
        about: dict[str, Any] = {"fd": fd, "device": device, "is_mapped": is_mapped}
        loan = Loan(told["epoch"], medium, n_bytes, told["name"], **about)
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
            with self._changing:
                n_bytes = sum(loan.resident_bytes for loan in self._loans)
            if n_bytes != self._told_bytes:
                self._told_bytes = n_bytes
                self._on_borrowed(n_bytes)


def _ask_back(connection: socket.socket) -> None:
    wire.send(connection, {"wants_back": True})


class _Server:
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
