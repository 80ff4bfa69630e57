"""The host rung: live objects in memory files, which outlive the process but not the job.

A memory file (``memfd_create``) is memory that lives for as long as some process has it open. A
keeper outside the worker process, its nanny, has it open too: if the worker is killed the next one
finds it there, and when the job ends the kernel frees it. It has no name in any filesystem, so
neither the size of ``/dev/shm`` nor other users matter.

An image holds bytes of storages and buffers at aligned offsets, then the skeleton (see
``tensors.py``) and the places, then where those begin. Once written it is sealed.

A process has few descriptors, and may have many contexts. The keeper needs one for each; a worker
only for what does not use the file's own memory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import logging
import mmap
import os
import pickle
import resource
import struct
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dask_pcm.ladder.objects import tensors
from dask_pcm.ladder.objects.freeze import Frozen, thaw

logger = logging.getLogger(__name__)

#: Less than this is not worth an image.
LEAST_BYTES = 1 << 16
#: Of the files that a process may have open, images are one in so many at most.
_FILES_SHARE = 4
_ALIGN = 64
_FOOTER = struct.Struct("<Q")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Place:
    """Where bytes stand in an image, and for storages the device that they belong on."""

    start: int
    n_bytes: int
    device: str | None = None


class Image:
    """What was frozen, in a memory file.

    Parameters
    ----------
    fd
        Of a file that ``write`` has filled; from now on the image's.
    digest
        Of which context it must be.

    Raises
    ------
    ValueError
        Where it is something else: a descriptor's number may have been given to another file.
    """

    def __init__(self, fd: int, digest: str = "") -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self.n_bytes = os.fstat(fd).st_size
        (start,) = _FOOTER.unpack(os.pread(fd, _FOOTER.size, self.n_bytes - _FOOTER.size))
        tail = os.pread(fd, self.n_bytes - _FOOTER.size - start, start)
        found, self._skeleton, self._storages, self._buffers = pickle.loads(tail)
        if found != digest:
            raise ValueError(f"the image is of {found!r}, not of {digest!r}")

    @classmethod
    def write(cls, frozen: Frozen, digest: str = "") -> Image:
        """Freeze into a new memory file.

        Raises
        ------
        OSError
            Where there are no memory files, or no memory.
        """
        storages, buffers, end = _places(frozen)
        tail = pickle.dumps((digest, frozen.skeleton, storages, buffers))
        fd = os.memfd_create("dask_pcm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, end)
            tensors.write(fd, zip(frozen.storages, (p.start for p in storages), strict=True))
            for memory, place in zip(frozen.buffers, buffers, strict=True):
                _write(fd, memory, place.start)
            _write(fd, memoryview(tail + _FOOTER.pack(end)), end)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, digest)

    @classmethod
    def of_storages(cls, storages: Sequence[Any]) -> Image:
        """What storages hold, without an object; for as long as this process lives."""
        return cls.write(Frozen(None, list(storages)))

    @property
    def is_on_device(self) -> bool:
        """Whether some of it belongs on an accelerator."""
        return any(place.device not in (None, "cpu") for place in self._storages)

    @property
    def is_open(self) -> bool:
        """Whether it has its file; see ``thaw`` and ``close``."""
        return self._close.alive

    def thaw(self, is_mapped: bool) -> tuple[Any, list[Any]]:
        """Put the object together again.

        Parameters
        ----------
        is_mapped
            Whether what belongs to the CPU uses the file's own memory (what is written to it
            becomes this process's own), instead of a copy. Then the file is closed.

        Returns
        -------
        tuple
            The object and its storages. Those that are mapped cannot be resized.
        """
        memory = _mapped(self.fd, self.n_bytes)
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
        """Have storages that were emptied hold again what they held."""
        empty = [pair for pair in self._placed(storages) if not pair[0].nbytes()]
        sizes = {place.start: place.n_bytes for place in self._storages}
        try:
            for storage, start in empty:
                storage.resize_(sizes[start])
            tensors.read(self.fd, empty)
        except BaseException:  # there is no memory for all of it: as before
            for storage, _ in empty:
                storage.resize_(0)
            raise

    def is_same(self, storages: Sequence[Any]) -> bool:
        """Whether storages still hold what they held."""
        return tensors.is_same(self.fd, self._placed(storages))

    def _placed(self, storages: Sequence[Any]) -> list[tuple[Any, int]]:
        return [(s, place.start) for s, place in zip(storages, self._storages, strict=True)]

    def close(self) -> None:
        """Let go of the file; what is mapped stays for as long as it is used."""
        self._close()


class Keeper(Protocol):
    """Holds memory files open in another process; its methods may be called on any thread."""

    def find(self, digest: str) -> str | None:
        """A path at which the file of a context can be opened; None where it is not kept."""

    def keep(self, digest: str, path: str, n_bytes: int, is_shared: bool) -> bool | None:
        """Keep a file, for all workers of the host or for one.

        False where there is no room, None where nobody answers.
        """

    def drop(self, digest: str) -> None:
        """Keep it no longer."""


class Host:
    """Images that this process made or found.

    Parameters
    ----------
    keeper
        Who keeps them beyond this process; None if nobody does.
    """

    def __init__(self, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        self._images: dict[str, Image] = {}
        self._changing = threading.Lock()

    def find(self, digest: str) -> Image | None:
        """The image of a context; None where there is none."""
        with self._changing:
            image = self._images.get(digest)
            if (image is None or not image.is_open) and self._keeper is not None:
                self._images.pop(digest, None)
                path = self._keeper.find(digest)
                if path is not None:
                    try:
                        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                        self._images[digest] = Image(fd, digest)
                    except Exception as error:  # dropped since, or another's by now
                        logger.info("The image of %s is gone: %s", digest, error)
            return self._images.get(digest)

    def put(self, digest: str, name: str, frozen: Frozen) -> Image | None:
        """Make an image of an object that holds tensors or arrays; None where that cannot be.

        Without one a killed worker builds the object again, from the files on its disk.
        """
        if self._keeper is None or frozen.skeleton is None or frozen.n_bytes < LEAST_BYTES:
            return None
        try:
            image = self._written(digest, frozen)
        except Exception as error:  # no memory files here, no memory, no way off the device
            _warn(name, frozen, str(error))
            return None
        path = f"/proc/{os.getpid()}/fd/{image.fd}"
        is_kept = self._keeper.keep(digest, path, image.n_bytes, not image.is_on_device)
        if is_kept:
            with self._changing:
                self._images[digest] = image
            return image
        image.close()
        if is_kept is None:  # the toolkit leaves, or the job ends
            logger.info("Nobody is there to keep context %r beyond its process", name)
        else:
            _warn(name, frozen, "there is no room for it (pcm.ladder.host.budget, ulimit -n)")
        return None

    def _written(self, digest: str, frozen: Frozen) -> Image:
        with self._changing:
            n_open = sum(image.is_open for image in self._images.values())
        if n_open >= max_files():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Image.write(frozen, digest)

    def drop(self, digest: str) -> None:
        """Forget an image, here and at the keeper's."""
        with self._changing:
            image = self._images.pop(digest, None)
        if image is not None:
            image.close()
        if self._keeper is not None:
            self._keeper.drop(digest)


def _warn(name: str, frozen: Frozen, why: str) -> None:
    logger.warning(
        "Context %r (%s bytes) is not kept in the host's memory: %s. A worker that is killed"
        " loads it again, from its disk.",
        name,
        f"{frozen.n_bytes:,}",
        why,
    )


def _places(frozen: Frozen) -> tuple[list[Place], list[Place], int]:
    """Where everything goes, and where that ends."""
    at, storages, buffers = 0, [], []
    for storage in frozen.storages:
        storages.append(Place(at, storage.nbytes(), str(storage.device)))
        at += -(-storage.nbytes() // _ALIGN) * _ALIGN
    for buffer in frozen.buffers:
        buffers.append(Place(at, buffer.nbytes))
        at += -(-buffer.nbytes // _ALIGN) * _ALIGN
    return storages, buffers, at


def _write(fd: int, memory: memoryview, at: int) -> None:
    while memory:
        n_done = os.pwrite(fd, memory, at)
        memory, at = memory[n_done:], at + n_done


def max_files() -> int:
    """How many images a process may have open, so that enough descriptors are left to others."""
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if n_files == resource.RLIM_INFINITY else n_files // _FILES_SHARE


def _mapped(fd: int, n_bytes: int) -> memoryview:
    """A file's memory, copied where it is written to; until the last view of it is gone.

    Python's own ``mmap`` would hold a descriptor all that time.
    """
    start = _libc().mmap(None, n_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0)
    if start == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_char * n_bytes).from_address(start)
    unmaps = weakref.finalize(memory, _libc().munmap, start, n_bytes)
    unmaps.atexit = False  # other threads may be using it to the end
    return memoryview(memory).cast("B")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
