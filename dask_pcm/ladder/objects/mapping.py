"""Files that are mapped into this process's memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref


def mapped(fd: int, n_bytes: int, is_shared: bool = False) -> memoryview:
    """Map a file copy-on-write, or share it; it is unmapped with the last view of it.

    Not with Python's ``mmap``, which keeps a descriptor as long as the mapping. What is shared is
    not mapped in forked children, which may live longer.

    Raises
    ------
    OSError
        If the system refuses.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    sharing = mmap.MAP_SHARED if is_shared else mmap.MAP_PRIVATE
    start = _libc().mmap(None, n_bytes, access, sharing, fd, 0)
    if start == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if is_shared and hasattr(mmap, "MADV_DONTFORK"):
        _libc().madvise(start, n_bytes, mmap.MADV_DONTFORK)
    memory = (ctypes.c_char * n_bytes).from_address(start)
    unmaps = weakref.finalize(memory, _unmap, os.getpid(), start, n_bytes)
    unmaps.atexit = False  # daemon threads may use the memory until the process ends
    return memoryview(memory).cast("B")


def _unmap(pid: int, start: int, n_bytes: int) -> None:
    if os.getpid() == pid:  # in a forked child, something else may be there
        _libc().munmap(start, n_bytes)


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library with the signatures of mmap, munmap and madvise."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
