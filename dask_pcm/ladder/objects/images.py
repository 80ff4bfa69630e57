"""The host tier: images of live objects in memory files, which survive the process, not the job.

A memory file (``memfd_create``) exists as long as a process has it open. The worker's nanny, as its
keeper, has it open too. If the worker is killed, its successor finds the image there; when the job
ends, the kernel frees it. A memory file has no name in a filesystem, so neither the size of
``/dev/shm`` nor other users affect it.

An image holds the bytes of storages and buffers at aligned offsets, then a pickle of the skeleton
(see ``freeze.py``) and these offsets, then the offset of that pickle. Once written it is sealed.

A process has few file descriptors and may have many contexts. The keeper (``host.py``) needs one
for each. A worker closes its own once it has read the image.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dask_pcm.ladder.objects import tensors
from dask_pcm.ladder.objects.freeze import Frozen, thaw
from dask_pcm.ladder.objects.mapping import mapped

_ALIGN = 64
_FOOTER = struct.Struct("<Q")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Place:
    """Offset and length of bytes in an image; for a storage also the device that it belongs on."""

    start: int
    n_bytes: int
    device: str | None = None


class NoRoomError(Exception):
    """The host tier has no room for an image.

    Attributes
    ----------
    is_refused
        Whether its budget is why; otherwise its keeper does not answer.
    """

    def __init__(self, is_refused: bool) -> None:
        super().__init__("the host has no room for it (pcm.ladder.host.budget, ulimit -n)")
        self.is_refused = is_refused


class Image:
    """A frozen object in a memory file.

    Parameters
    ----------
    fd
        A descriptor of a file that ``write`` has filled; the image takes it over and closes it.
    digest
        The context that the image must belong to.

    Raises
    ------
    ValueError
        If the file is another one: the keeper's descriptor number may have been reused. If it is
        not written yet.
    """

    def __init__(self, fd: int, digest: str = "") -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self.n_bytes = os.fstat(fd).st_size
        (start,) = _FOOTER.unpack(os.pread(fd, _FOOTER.size, self.n_bytes - _FOOTER.size))
        if not start:  # the footer comes last
            raise ValueError("the image is not written yet")
        tail = os.pread(fd, self.n_bytes - _FOOTER.size - start, start)
        found, self._skeleton, self._storages, self._buffers = pickle.loads(tail)
        if found != digest:
            raise ValueError(f"the image is of {found!r}, not of {digest!r}")

    @classmethod
    def write(
        cls,
        frozen: Frozen,
        digest: str = "",
        admit: Callable[[int, int, bool], None] = lambda fd, n_bytes, is_on_device: None,
    ) -> Image:
        """Write a frozen object to a new memory file.

        Parameters
        ----------
        admit
            Called with the file, its size, and whether some storage belongs on an accelerator,
            before the file takes any memory. What it raises ends the attempt.

        Raises
        ------
        OSError
            If the system has no memory files, or no memory left.
        """
        storages, buffers, end = _places(frozen)
        tail = pickle.dumps((digest, frozen.skeleton, storages, buffers)) + _FOOTER.pack(end)
        fd = os.memfd_create("dask_pcm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, end + len(tail))
            admit(fd, end + len(tail), _is_on_device(storages))
            tensors.write(fd, zip(frozen.storages, (p.start for p in storages), strict=True))
            for memory, place in zip(frozen.buffers, buffers, strict=True):
                _write(fd, memory, place.start)
            _write(fd, memoryview(tail), end)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, digest)

    @property
    def is_on_device(self) -> bool:
        """Whether some storage belongs on an accelerator."""
        return _is_on_device(self._storages)

    @property
    def is_open(self) -> bool:
        """Whether its file is open; see ``thaw`` and ``close``."""
        return self._close.alive

    def thaw(self, is_mapped: bool) -> tuple[Any, list[Any]]:
        """Make the object again.

        Parameters
        ----------
        is_mapped
            Whether CPU storages are mapped copy-on-write from the file instead of copied. If they
            are mapped, the file is closed.

        Returns
        -------
        tuple
            The object and its storages. Mapped storages cannot be resized.
        """
        memory = mapped(self.fd, self.n_bytes)
        maps = is_mapped and not self.is_on_device
        storages = [
            tensors.mapped_storage(memory[p.start : p.start + p.n_bytes])
            if maps and p.n_bytes
            else tensors.new_storage(p.n_bytes, p.device or "cpu")
            for p in self._storages
        ]
        if not maps:
            tensors.read(self.fd, self._placed(storages))
        buffers = [memory[p.start : p.start + p.n_bytes] for p in self._buffers]
        value = thaw(self._skeleton, storages, buffers)
        if maps:
            self.close()
        return value, storages

    def refill(self, storages: Sequence[Any]) -> None:
        """Allocate emptied storages again and fill them from the image.

        If memory runs out, all of them are empty again.
        """
        empty = [pair for pair in self._placed(storages) if not pair[0].nbytes()]
        sizes = {place.start: place.n_bytes for place in self._storages}
        try:
            for storage, start in empty:
                storage.resize_(sizes[start])
            tensors.read(self.fd, empty)
        except BaseException:  # a half-filled object would compute garbage
            for storage, _ in empty:
                storage.resize_(0)
            raise

    def is_same(self, storages: Sequence[Any]) -> bool:
        """Whether storages still equal the image, bit for bit."""
        sizes = [place.n_bytes for place in self._storages]
        is_alike = sizes == [storage.nbytes() for storage in storages]
        return is_alike and tensors.is_same(self.fd, self._placed(storages))

    def _placed(self, storages: Sequence[Any]) -> list[tuple[Any, int]]:
        """Storages with their offsets."""
        return [(s, place.start) for s, place in zip(storages, self._storages, strict=True)]

    def close(self) -> None:
        """Close the file; mapped memory stays as long as it is used."""
        self._close()


def _is_on_device(storages: Sequence[Place]) -> bool:
    """Whether some storage belongs on an accelerator."""
    return any(place.device not in (None, "cpu") for place in storages)


def _places(frozen: Frozen) -> tuple[list[Place], list[Place], int]:
    """The places of storages and buffers, and the end of the last one."""
    at, storages, buffers = 0, [], []
    for storage in frozen.storages:
        storages.append(Place(at, storage.nbytes(), str(storage.device)))
        at += -(-storage.nbytes() // _ALIGN) * _ALIGN
    for buffer in frozen.buffers:
        buffers.append(Place(at, buffer.nbytes))
        at += -(-buffer.nbytes // _ALIGN) * _ALIGN
    return storages, buffers, at


def _write(fd: int, memory: memoryview, at: int) -> None:
    """Write all of `memory`; one call may write less."""
    while memory:
        n_done = os.pwrite(fd, memory, at)
        memory, at = memory[n_done:], at + n_done
