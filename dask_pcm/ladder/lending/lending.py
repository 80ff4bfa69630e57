"""A worker's part in lending on its host: it lends what it can spare, and borrows what it needs."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dask_pcm.ladder.lending import wire
from dask_pcm.ladder.lending.leases import HOST, Leases
from dask_pcm.ladder.lending.loan import Loan
from dask_pcm.ladder.lending.server import Server

logger = logging.getLogger(__name__)

#: After lenders had nothing, none is asked for as much for this long.
_REST_S = 1.0
#: One that did not answer, perhaps since its process is stopped, is asked for nothing for a while:
#: the first time, each twice as long, and the longest.
_SILENT_S, _LONGEST_SILENT_S = 2.0, 60.0
#: How long an answer is waited for, and longer for each byte of the host, which is filled first,
#: and how much longer at most.
_ANSWER_S, _FILL_S, _LONGEST_FILL_S = 0.5, 1.0 / (1 << 30), 60.0
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
        #: Until when lenders that did not answer are left alone, and how long that is.
        self._silent: dict[str, tuple[float, float]] = {}
        self._server: Server | None = None
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
                self._server = Server(wire.listen(cluster), name, self.leases)
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
        about: dict[str, Any] = {"device": device, "is_own": True}
        loan = Loan(lease.epoch, medium, n_bytes, self._name or "itself", **about)
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
            if address == server.address or now < self._silent.get(address, (0.0, 0.0))[0]:
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
        now = time.monotonic()
        if answer is None and now - begun >= timeout_s:
            _, last_s = self._silent.get(address, (0.0, 0.0))
            rest_s = min(_LONGEST_SILENT_S, max(_SILENT_S, 2.0 * last_s))
            self._silent[address] = now + rest_s, rest_s
        elif answer is not None:
            self._silent.pop(address, None)
        if answer is None or answer[0].get("epoch") is None:
            connection.close()
            return None
        return connection, *answer

    def _asked(
        self,
        server: Server,
        address: str,
        medium: str,
        n_bytes: int,
        device: str | None,
        is_mapped: bool,
    ) -> Loan | None:
        fill_s = min(_LONGEST_FILL_S, _FILL_S * n_bytes) if medium == HOST else 0.0
        timeout_s = _ANSWER_S + fill_s
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
