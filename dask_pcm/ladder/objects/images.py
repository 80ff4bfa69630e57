"""The host tier: images of live objects in memory files, which survive the process, not the job.

A memory file (``memfd_create``) exists as long as a process has it open. The worker's nanny, as its
keeper, has it open too. If the worker is killed, its successor finds the image there; when the job
ends, the kernel frees it. A memory file has no name in a filesystem, so neither the size of
``/dev/shm`` nor other users affect it.

An image holds the bytes of storages and buffers at aligned offsets, then a pickle of the skeleton
(see ``freeze.py``) and these offsets, then the offset of that pickle. Once written it is sealed.

A process has few file descriptors and may have many contexts. The keeper needs one for each. A
worker closes its own once the image is mapped.
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

#: Smaller objects get no image: loading them again is as fast.
LEAST_BYTES = 1 << 16
#: Images may use this fraction (1/n) of the files that a process may have open.
_FILES_SHARE = 4
_ALIGN = 64
_FOOTER = struct.Struct("<Q")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Place:
    """Offset and length of bytes in an image; for a storage also the device that it belongs on."""

    start: int
    n_bytes: int
    device: str | None = None


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
        If the file is another one: the keeper's descriptor number may have been reused.
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
        """Write a frozen object to a new memory file.

        Raises
        ------
        OSError
            If the system has no memory files, or no memory left.
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
        """Write storages without a skeleton; for offloading within this process."""
        return cls.write(Frozen(None, list(storages)))

    @property
    def is_on_device(self) -> bool:
        """Whether some storage belongs on an accelerator."""
        return any(place.device not in (None, "cpu") for place in self._storages)

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
        return tensors.is_same(self.fd, self._placed(storages))

    def _placed(self, storages: Sequence[Any]) -> list[tuple[Any, int]]:
        """Storages with their offsets."""
        return [(s, place.start) for s, place in zip(storages, self._storages, strict=True)]

    def close(self) -> None:
        """Close the file; mapped memory stays as long as it is used."""
        self._close()


class Keeper(Protocol):
    """Holds memory files open in another process; its methods may be called on any thread."""

    def find(self, digest: str) -> str | None:
        """A path at which the file of a context can be opened; None if it is not kept."""

    def keep(self, digest: str, path: str, n_bytes: int, is_shared: bool) -> bool | None:
        """Keep a file, for all workers of the host if `is_shared`, otherwise for this one.

        Returns False if there is no room, None if the keeper does not answer.
        """

    def drop(self, digest: str) -> None:
        """Keep a context's file no longer."""


class Host:
    """The images that this process has made or found; for any thread.

    Parameters
    ----------
    keeper
        Keeps images beyond this process; None to keep none.
    """

    def __init__(self, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        self._images: dict[str, Image] = {}
        self._changing = threading.Lock()

    def find(self, digest: str) -> Image | None:
        """The image of a context, from this process or the keeper; None if there is none."""
        # Under the lock throughout, so that two threads do not open the same file twice.
        with self._changing:
            image = self._images.get(digest)
            if (image is None or not image.is_open) and self._keeper is not None:
                self._images.pop(digest, None)
                path = self._keeper.find(digest)
                if path is not None:
                    try:
                        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                        self._images[digest] = Image(fd, digest)
                    except Exception as error:  # dropped since, or the descriptor was reused
                        logger.info("The image of %s is gone: %s", digest, error)
            return self._images.get(digest)

    def put(self, digest: str, name: str, frozen: Frozen) -> Image | None:
        """Make an image of an object and give it to the keeper; None if that is impossible.

        Without an image, the successor of a killed worker loads the object from staged files.
        """
        if self._keeper is None or frozen.skeleton is None or frozen.n_bytes < LEAST_BYTES:
            return None
        try:
            image = self._written(digest, frozen)
        except Exception as error:  # no memory files, no memory, or a device error
            _warn(name, frozen, str(error))
            return None
        path = f"/proc/{os.getpid()}/fd/{image.fd}"
        is_kept = self._keeper.keep(digest, path, image.n_bytes, not image.is_on_device)
        if is_kept:
            with self._changing:
                self._images[digest] = image
            return image
        image.close()
        if is_kept is None:  # the toolkit is being uninstalled, or the job ends
            logger.info("The nanny does not answer, so context %r is not kept", name)
        else:
            _warn(name, frozen, "there is no room for it (pcm.ladder.host.budget, ulimit -n)")
        return None

    def _written(self, digest: str, frozen: Frozen) -> Image:
        """Write an image, unless this process has too many files open already."""
        with self._changing:
            n_open = sum(image.is_open for image in self._images.values())
        if n_open >= max_files():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Image.write(frozen, digest)

    def drop(self, digest: str) -> None:
        """Drop an image, here and at the keeper."""
        with self._changing:
            image = self._images.pop(digest, None)
        if image is not None:
            image.close()
        if self._keeper is not None:
            self._keeper.drop(digest)


def _warn(name: str, frozen: Frozen, why: str) -> None:
    """Log that an object has no image."""
    logger.warning(
        "Context %r (%s bytes) is not kept on the host tier: %s. The successor of a killed worker"
        " loads it again, from its disk.",
        name,
        f"{frozen.n_bytes:,}",
        why,
    )


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


def max_files() -> int:
    """How many images a process may have open, so that enough descriptors are left."""
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if n_files == resource.RLIM_INFINITY else n_files // _FILES_SHARE


def _mapped(fd: int, n_bytes: int) -> memoryview:
    """Map a file copy-on-write; it is unmapped with the last view of it.

    Not with Python's ``mmap``, which keeps a descriptor as long as the mapping.
    """
    start = _libc().mmap(None, n_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0)
    if start == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_char * n_bytes).from_address(start)
    unmaps = weakref.finalize(memory, _libc().munmap, start, n_bytes)
    unmaps.atexit = False  # daemon threads may use the memory until the process ends
    return memoryview(memory).cast("B")


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library with the signatures of mmap and munmap."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
