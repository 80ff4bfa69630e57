"""The host tier's memory files within their budget, for the processes of one host.

A file that is pinned is the only copy of a context: it has left the device. The others are copies
of contexts that are elsewhere as well, and make room for each other.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field

#: Images may use this fraction (1/n) of the files that a process may have open.
_FILES_SHARE = 4


@dataclass(frozen=True, slots=True)
class Kept:
    """A memory file that is held open.

    Attributes
    ----------
    pins
        The processes that cannot do without it.
    owner
        The only process that it is of use to; None if it serves the successors of that as well.
    """

    fd: int
    n_bytes: int
    pins: set[str] = field(default_factory=set)
    owner: str | None = None


class Shelf:
    """Holds memory files open, by name; for any thread.

    Processes are told apart by any names that are theirs alone.

    Parameters
    ----------
    budget_bytes
        What all files may take. Files that nothing has pinned make room: the least recently used
        first, or the smallest where there are too many for this process.

    Attributes
    ----------
    n_users
        Keepers that have it in common.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.n_users = 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._changing = threading.RLock()
        weakref.finalize(self, _close, self._kept)

    def find(self, name: str) -> str | None:
        """The path at which processes of this user can open a file; None if it is not kept."""
        with self._changing:
            if name not in self._kept:
                return None
            self._kept.move_to_end(name)
            return f"/proc/{os.getpid()}/fd/{self._kept[name].fd}"

    def keep(
        self, name: str, path: str, n_bytes: int, owner: str | None = None, is_loan: bool = False
    ) -> bool | None:
        """Hold a file open; False if there is no room, None if the file is gone.

        Parameters
        ----------
        owner
            The process that pins it, and that alone can use it.
        is_loan
            Whether no other file makes room for it.
        """
        with self._changing:
            self.drop(name)
            if not (self._has_room(n_bytes) if is_loan else self._make_room(n_bytes)):
                return False
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):  # other code has used up the limit
                    return False
                raise
            # The other process closed its descriptor: the number belongs to another file by now.
            if os.fstat(fd).st_size != n_bytes:
                os.close(fd)
                return None
            self._kept[name] = Kept(fd, n_bytes, set() if owner is None else {owner}, owner)
            return True

    def pin(self, name: str, process: str) -> bool:
        """Keep a file until ``unpin``; False if it is not there any more."""
        with self._changing:
            if name not in self._kept:
                return False
            self._kept[name].pins.add(process)
            return True

    def unpin(self, name: str, process: str) -> None:
        """A process has another copy; the file may make room again."""
        with self._changing:
            if name in self._kept:
                self._kept[name].pins.discard(process)

    def leave(self, process: str) -> None:
        """A process has ended: drop what was of use to it alone, and its pins."""
        with self._changing:
            for name, kept in list(self._kept.items()):
                kept.pins.discard(process)
                if kept.owner == process:
                    self.drop(name)

    def clear(self, suffix: str = "") -> None:
        """Drop all files whose name ends with `suffix`."""
        with self._changing:
            for name in [name for name in self._kept if name.endswith(suffix)]:
                self.drop(name)

    def drop(self, name: str, process: str | None = None) -> None:
        """Drop a file; its memory is freed once no process has it open or mapped.

        Parameters
        ----------
        process
            The process that asks. A file that others have pinned stays; None to drop it even so.
        """
        with self._changing:
            kept = self._kept.get(name)
            if kept is None:
                return
            if process is not None and kept.pins - {process}:
                kept.pins.discard(process)
                return
            os.close(self._kept.pop(name).fd)

    def _has_room(self, n_bytes: int) -> bool:
        """Whether a file fits beside all others."""
        n_kept = sum(kept.n_bytes for kept in self._kept.values())
        return n_kept + n_bytes <= self.budget_bytes and len(self._kept) < max_files()

    def _make_room(self, n_bytes: int) -> bool:
        """Drop what nothing has pinned until a file fits; False, and drop none, if it cannot."""
        pinned = [kept for kept in self._kept.values() if kept.pins]
        is_full = sum(kept.n_bytes for kept in pinned) + n_bytes > self.budget_bytes
        if is_full or len(pinned) >= max_files():
            return False
        while sum(kept.n_bytes for kept in self._kept.values()) + n_bytes > self.budget_bytes:
            self.drop(self._spare()[0])
        while len(self._kept) >= max_files():
            self.drop(min(self._spare(), key=lambda name: self._kept[name].n_bytes))
        return True

    def _spare(self) -> list[str]:
        """Files that may make room, the least recently used first."""
        return [name for name, kept in self._kept.items() if not kept.pins]


def _close(kept: OrderedDict[str, Kept]) -> None:
    """Close all files of a shelf that is garbage-collected."""
    for file in kept.values():
        os.close(file.fd)


def max_files() -> int:
    """How many images a process may have open, so that enough descriptors are left."""
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if n_files == resource.RLIM_INFINITY else n_files // _FILES_SHARE
