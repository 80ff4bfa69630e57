"""Lock files of one output, for object stores that cannot put an object only if there is none.

They lie in a folder of the output's own below one that driver and workers share. What others put
beside that folder, or in its place, is not opened.
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

#: A lock whose holder has shown nothing for so long is taken over.
SILENT_S = 30.0
#: How often a lock that another holds is looked at.
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class LockFiles:
    """Lock files of the output at a URL.

    Attributes
    ----------
    tree
        The folder that is shared.
    url
        The output; other runs of it have the same locks.
    silent_s
        A lock whose holder has shown nothing for so long is taken over.
    """

    tree: Tree
    url: str
    silent_s: float

    def _at(self, name: str) -> str:
        return f"pcm-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}/{name}.lock"

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        """Of several runs that begin at once, one at a time is in here."""
        name = self._at("run")
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
        """Hold the lock of a part, if nobody else does: whether it is held."""
        name = self._at(part)
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
        """Remove a lock whose holder shows nothing, by the clock of the filesystem it is on."""
        probe = f"{name}.{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            self.tree.creator(probe).close()
            age_s = self.tree.status(probe).st_mtime - self.tree.status(name).st_mtime
            if age_s > self.silent_s:
                self.tree.rename(name, probe)  # of several who see it, one
        self.tree.remove(probe)


@contextlib.contextmanager
def refreshing(touch: Callable[[], Any], silent_s: float) -> Iterator[None]:
    """Show from time to time that whoever holds a lock is at work."""
    is_over = threading.Event()

    def refresh() -> None:
        while not is_over.wait(silent_s / 5):
            with contextlib.suppress(Exception):  # a store that is away for a while
                touch()

    thread = threading.Thread(target=refresh, name="pcm-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
