"""Contexts off the device, in memory that is lent: of a device if possible, or of the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dask_pcm.ladder.lending.lending import Lending
from dask_pcm.ladder.lending.loan import Loan
from dask_pcm.ladder.objects import tensors
from dask_pcm.ladder.objects.host import ContextImages
from dask_pcm.ladder.objects.images import NoRoomError
from dask_pcm.ladder.objects.live import Storages

logger = logging.getLogger(__name__)

_ALIGN = 64


class LentStorages:
    """Tensors that have left the device, in borrowed memory; a ``Storages``.

    Parameters
    ----------
    loan
        Memory for them; closed with ``close``.
    storages
        What is copied there.
    """

    def __init__(self, loan: Loan, storages: Sequence[Any]) -> None:
        self.loan = loan
        self._sizes = [storage.nbytes() for storage in storages]
        if loan.fd is not None:
            tensors.write(loan.fd, self._placed(storages))
        else:
            for storage, part in zip(storages, self.parts(), strict=True):
                part.copy_(tensors.as_bytes(storage))

    def refill(self, storages: Sequence[Any]) -> None:
        """See ``Storages``."""
        placed = zip(storages, self._starts(), self._sizes, strict=True)
        empty = [(storage, at, size) for storage, at, size in placed if not storage.nbytes()]
        try:
            for storage, _, size in empty:
                storage.resize_(size)
            if self.loan.fd is not None:
                tensors.read(self.loan.fd, [(storage, at) for storage, at, _ in empty])
            else:
                for storage, at, size in empty:
                    tensors.as_bytes(storage).copy_(self.loan.memory()[at : at + size])
        except BaseException:  # a half-filled object would compute garbage
            for storage, _, _ in empty:
                storage.resize_(0)
            raise

    def parts(self) -> list[Any]:
        """What is there of each storage, as bytes."""
        memory = self.loan.memory()
        return [
            memory[at : at + size] for at, size in zip(self._starts(), self._sizes, strict=True)
        ]

    def _starts(self) -> Iterator[int]:
        at = 0
        for size in self._sizes:
            yield at
            at += _aligned(size)

    def _placed(self, storages: Sequence[Any]) -> list[tuple[Any, int]]:
        return list(zip(storages, self._starts(), strict=True))


class LentTier:
    """Where a context goes from the device: a ``LowerTier``.

    First to what devices of this host have to spare, then to the host tier, then to what neighbours
    have to spare there.

    Parameters
    ----------
    images
        The host tier.
    lending
        Where memory is borrowed.
    on_wanted
        Called, on any thread, once ``move`` has to be.
    """

    def __init__(
        self, images: ContextImages, lending: Lending, on_wanted: Callable[[], None]
    ) -> None:
        self._images = images
        self._lending = lending
        self._on_wanted = on_wanted
        self._lent: LentStorages | None = None

    def pin(self, storages: Sequence[Any]) -> Storages:
        """See ``LowerTier``."""
        return self._borrowed("neighbour", storages) or self._on_host(storages)

    def unpin(self) -> None:
        """See ``LowerTier``."""
        lent, self._lent = self._lent, None
        if lent is None:
            self._images.unpin()
        else:
            lent.loan.close()

    def move(self) -> Storages | None:
        """Leave memory that its lender wants back; None if none is wanted back.

        Raises
        ------
        NoRoomError, OSError, MemoryError
            As ``pin``. The context is where it was.
        """
        lent = self._lent
        if lent is None or not lent.loan.is_wanted_back:
            return None
        # Over the host: the lender's device has no room for a copy.
        parts = [part.cpu() for part in lent.parts()]
        found = self._on_host([tensors.storage_of(part) for part in parts])
        del parts
        lent.loan.close()
        return found

    def _on_host(self, storages: Sequence[Any]) -> Storages:
        """On the host tier, or in memory of the host that neighbours lend."""
        try:
            found: Storages = self._images.pin(storages)
            self._lent = None
            return found
        except (NoRoomError, OSError, MemoryError):
            lent = self._borrowed("host", storages)
            if lent is None:
                raise
            return lent

    def _borrowed(self, rung: str, storages: Sequence[Any]) -> Storages | None:
        n_bytes = sum(_aligned(storage.nbytes()) for storage in storages)
        loan = self._lending.borrow(rung, n_bytes, is_mapped=False) if n_bytes else None
        if loan is None:
            return None
        try:
            lent = LentStorages(loan, storages)
        except (OSError, MemoryError, RuntimeError) as error:
            loan.close()
            logger.info("Memory that %s lends cannot be used: %s", loan.lender, error)
            return None
        self._lent = lent
        loan.on_wanted(self._on_wanted)
        return lent


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN
