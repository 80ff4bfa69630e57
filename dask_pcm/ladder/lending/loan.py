"""Memory that a worker has borrowed from a neighbour, or of what its own device has to spare."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dask_pcm.ladder.objects.mapping import mapped
from dask_pcm.ladder.objects.tensors import is_out_of_memory

logger = logging.getLogger(__name__)


#: The loans of this process. A forked child keeps none of their files.
_loans: weakref.WeakSet[Loan] = weakref.WeakSet()


class Loan:
    """Borrowed memory; for any thread, but one at a time uses the memory.

    It stays until ``close``, even if its lender dies: it is never taken away under its user.

    Parameters
    ----------
    epoch, medium, n_bytes
        See ``Lease``.
    lender
        Its name, for messages.
    fd
        Memory of the host as a file; the loan closes it.
    device
        Of memory of a device, its name for torch in this process.
    is_mapped
        Whether a file is mapped by this process, instead of read and written.
    is_own
        Whether it is of what this worker's own device has to spare.

    Attributes
    ----------
    is_wanted_back
        Whether the lender wants it back, or is dead: move what is there, then ``close``.
    """

    def __init__(
        self,
        epoch: int,
        medium: str,
        n_bytes: int,
        lender: str,
        *,
        fd: int | None = None,
        device: str | None = None,
        is_mapped: bool = True,
        is_own: bool = False,
    ) -> None:
        self.epoch = epoch
        self.medium = medium
        self.n_bytes = n_bytes
        self.lender = lender
        self.fd = fd
        self.device = device
        self.is_own = is_own
        self.is_wanted_back = False
        self.is_closed = False
        #: What it takes of this process's memory, as the system counts it.
        self.resident_bytes = n_bytes if device == "cpu" or (fd is not None and is_mapped) else 0
        self._memory: Any = None
        self._end: Callable[[], None] = lambda: None
        self._on_wanted: Callable[[], None] | None = None
        self._changing = threading.Lock()
        _loans.add(self)

    def memory(self) -> Any:
        """Its bytes as a tensor, shape (n_bytes,), uint8; the first call maps or takes them.

        Raises
        ------
        OSError, MemoryError, RuntimeError
            If that is impossible.
        """
        if self._memory is None:
            import torch

            if self.fd is not None:
                shared = mapped(self.fd, self.n_bytes, is_shared=True)
                self._memory = torch.frombuffer(shared, dtype=torch.uint8)
            else:
                self._memory = torch.empty(self.n_bytes, dtype=torch.uint8, device=self.device)
        return self._memory

    def ends_with(self, call: Callable[[], None]) -> None:
        """Have something called once it is closed, which tells the lender."""
        self._end = call

    def on_wanted(self, call: Callable[[], None]) -> None:
        """Have something called once the memory is wanted back; at once if it is by now.

        It is called on any thread, and must not wait for others.
        """
        with self._changing:
            self._on_wanted = call
            is_wanted = self.is_wanted_back
        if is_wanted:
            call()

    def want_back(self) -> None:
        """The lender wants it back, or is dead."""
        with self._changing:
            is_new = not (self.is_wanted_back or self.is_closed)
            self.is_wanted_back = True
            call = self._on_wanted
        if is_new and call is not None:
            call()

    def close(self) -> None:
        """Return the memory; tensors of it must not be in use any more."""
        with self._changing:
            if self.is_closed:
                return
            self.is_closed, self._on_wanted = True, None
        self._memory = None
        fd, self.fd = self.fd, None  # first: another thread may fork meanwhile
        if fd is not None:
            os.close(fd)
        elif self.device is not None and self.device.startswith("cuda"):
            _free_cached()
        self._end()


def _free_cached() -> None:
    """Give memory of devices that torch keeps for later back to the driver."""
    import torch

    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:  # of a device that is lost
        if not is_out_of_memory(error):
            logger.info("Memory of a device was not given back: %s", error)


def _close_in_child() -> None:
    for loan in _loans:
        fd, loan.fd = loan.fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
