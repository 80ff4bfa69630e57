"""Trees: a bundle as its loader sees it, a folder of links to blobs or to local files.

A tree that matches is never replaced while another loader may read it, and one that is wrong is
replaced as a whole: it is made beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from dask_pcm.ladder.files.locks import locked

#: What was not written to for this long was left by a process that has ended.
_STALE_S = 86_400.0
_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB


class Trees:
    """The trees of one cache; for any thread and any process of the host.

    Parameters
    ----------
    folder
        Where the trees are.
    locks
        Where their locks are: beside the blobs, as a tree may be removed while its lock is held.
    """

    def __init__(self, folder: Path, locks: Path) -> None:
        self._folder = folder
        self._locks = locks

    def _lock(self, name: str) -> Path:
        """The file that is locked while a tree is checked or made."""
        return self._locks / f"{name}.tree"

    def make(self, name: str, targets: Mapping[str, Path]) -> Path:
        """Return a folder of these links; made anew if its contents differ, as a loader may write.

        A tree that matches is never replaced: another loader may be reading it.
        """
        tree = self._folder / name
        # One at a time: otherwise a process could replace the tree that another has just returned.
        with locked(self._lock(name), fcntl.LOCK_EX):
            if _links(tree) == targets:
                return tree
            making, aside = (self._folder / f".{name}-{uuid.uuid4().hex}" for _ in range(2))
            for link, target in targets.items():
                (making / link).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                (making / link).symlink_to(target)
            with contextlib.suppress(FileNotFoundError):
                tree.rename(aside)
            making.rename(tree)
        shutil.rmtree(aside, ignore_errors=True)
        return tree

    def clean(self) -> None:
        """Remove trees all of whose links dangle. A tree in use has locked blobs, so it stays."""
        names = {path.stem for path in self._locks.glob("*.tree")}
        for name in names | {path.name for path in self._folder.glob("[!.]*")}:
            tree, lock = self._folder / name, self._lock(name)
            if not _is_dangling(tree):
                continue
            with contextlib.suppress(BlockingIOError), locked(lock, _AT_ONCE):
                if _is_dangling(tree):  # again, under the lock: it may have been made anew
                    shutil.rmtree(tree, ignore_errors=True)
                    lock.unlink()

    def remove_stale(self) -> None:
        """Remove what processes that were killed had begun to make."""
        for path in self._folder.glob(".*"):
            if is_stale(path):
                shutil.rmtree(path, ignore_errors=True)


def is_stale(path: Path) -> bool:
    """Whether a file has not been written to for a day."""
    try:
        return time.time() - path.stat().st_mtime > _STALE_S
    except FileNotFoundError:
        return False


def _is_dangling(tree: Path) -> bool:
    """Whether a tree is missing, or no link in it leads to a file."""
    links = [path for path in tree.rglob("*") if path.is_symlink()]
    return not (any(path.exists() for path in links) if links else tree.exists())


def _links(tree: Path) -> dict[str, Path]:
    """The targets of the links in a folder; other files are listed with an empty path."""
    found = {}
    for path in tree.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(tree))] = path.readlink()
        elif not path.is_dir():
            found[str(path.relative_to(tree))] = Path()
    return found
