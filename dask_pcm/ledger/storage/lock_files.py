"""Lock files for outputs in object stores without conditional puts.

They are in a folder of their own per output, below a folder that driver and workers share. Links
and files that other users put there are not opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dask_pcm.ledger.storage.tree import Tree

#: Seconds without a refresh after which a lock may be taken over.
SILENT_S = 30.0
#: Seconds between looks at a lock that another process holds.
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class LockFiles:
    """Lock files of the output at a URL.

    Attributes
    ----------
    tree
        The shared folder.
    url
        The output; all its runs have the same locks.
    silent_s
        Seconds without a refresh after which a lock may be taken over.
    """

    tree: Tree
    url: str
    silent_s: float

    def _path_of(self, name: str) -> str:
        # A digest: one folder serves all outputs, and URLs are no file names.
        return f"pcm-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}/{name}.lock"

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        """Hold the lock that serialises takeovers; see ``Fence``."""
        name = self._path_of("run")
        self.tree.make_folder(os.path.dirname(name))
        descriptor = self.tree.open(name, os.O_RDWR | os.O_CREAT)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def hold(self, part: str) -> Iterator[bool]:
        """Try to hold the lock of a part; yield whether it is held.

        The lock is a file that exists, not a ``flock``: workers may be on hosts between which the
        shared filesystem passes no locks, but creates a file only once.
        """
        name = self._path_of(part)
        try:
            self.tree.make_folder(os.path.dirname(name))
            self.tree.creator(name).close()
        except FileExistsError:
            self._break(name)
            yield False
            return
        try:
            with refreshing(lambda: self.tree.touch(name), self.silent_s):
                yield True
        finally:
            self.tree.remove(name)

    def _break(self, name: str) -> None:
        """Remove a lock that its holder has stopped refreshing."""
        probe = f"{name}.{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            # Both times come from the filesystem's clock; clocks of hosts may differ.
            self.tree.creator(probe).close()
            age_s = self.tree.status(probe).st_mtime - self.tree.status(name).st_mtime
            if age_s > self.silent_s:
                # If several find the lock old, only one rename of it succeeds. None gets the lock
                # by that: all compete for creating it again.
                self.tree.rename(name, probe)
        self.tree.remove(probe)


@contextlib.contextmanager
def refreshing(touch: Callable[[], Any], silent_s: float) -> Iterator[None]:
    """Refresh a lock in a thread, five times per `silent_s`, while the block runs."""
    is_over = threading.Event()

    def refresh() -> None:
        while not is_over.wait(silent_s / 5):
            # A store may fail for a moment. Five attempts fit before the lock counts as silent.
            with contextlib.suppress(Exception):
                touch()

    thread = threading.Thread(target=refresh, name="pcm-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # Joined before the lock is given back: a late refresh would create it again.
        is_over.set()
        thread.join()
