"""Files of an output in a folder of a filesystem, written so that a fenced run fails.

What a run writes begins in its own folder, and is linked or renamed from there. Fencing a run
renames that folder, so every later link or rename of it fails: there is no moment between a look
at the fence and the write.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from dask_pcm.errors import FencedError, OutputError
from dask_pcm.ledger.journal.writer import NO_ROOM
from dask_pcm.ledger.storage.base import Entry, Storage
from dask_pcm.ledger.storage.tree import Tree

#: What is raised where a folder, or what is in it, is not there.
NO_FOLDER = (FileNotFoundError, NotADirectoryError)
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
#: Of the name of a file, in that of its temporary one.
_MAX_STEM = 100


@dataclass(frozen=True, slots=True)
class FolderFiles(Storage):
    """Files of an output in a folder.

    Attributes
    ----------
    is_guarded
        Whether folders of others are refused below ``_pcm``; see ``Tree``.
    """

    has_journals = True
    is_guarded: bool = field(default=True, kw_only=True)

    @property
    def tree(self) -> Tree:
        return Tree(self.path, self.is_guarded, self.owner)

    def entries(self, folder: str = "") -> dict[str, Entry]:
        found = {}
        with contextlib.suppress(*NO_FOLDER):
            for name, status in self.tree.entries(folder):
                shown = f"{name}/" if stat.S_ISDIR(status.st_mode) else name
                found[shown] = Entry(status.st_size, str(status.st_mtime_ns))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        with self.tree.reader(name) as file:
            return file.read()

    def reader(self, name: str) -> BinaryIO:
        return self.tree.reader(name)

    def exists(self, name: str) -> bool:
        return self.tree.exists(name)

    def write(self, name: str, data: bytes) -> None:
        temporary, tree = self.temporary(os.path.basename(name)), self.tree
        with self.fenced(temporary):
            with tree.creator(temporary) as file:
                file.write(data)
                sync_file(file)
            tree.rename(temporary, name)
            tree.sync_folder(os.path.dirname(name))

    def move(self, name: str, target: str) -> None:
        self.tree.make_folder(os.path.dirname(target))
        self.tree.rename(name, target)

    def remove(self, name: str) -> None:
        self.tree.remove(name)

    def create(self, name: str, flags: int) -> int:
        """A file that is there from now on, unless the run was replaced; open.

        Made in the run's folder, and linked from there as a part is: however long any of these
        calls takes, none makes a file once the run is fenced.
        """
        temporary, tree = self.temporary(os.path.basename(name)), self.tree
        try:
            tree.creator(temporary).close()
            link_new(tree, temporary, name)  # another thread may have been first
        finally:
            tree.remove(temporary)
        tree.sync_folder(os.path.dirname(name))
        return tree.open(name, flags)

    def temporary(self, name: str) -> str:
        """A name in the run's folder for what is to become `name`."""
        own = f"{name[:_MAX_STEM]}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        return f"{self.run_dir}/{own}"

    @contextlib.contextmanager
    def fenced(self, temporary: str | None = None) -> Iterator[None]:
        """Raise FencedError where the run's folder is gone, and OutputError where a disk is full.

        Then, and after any other error of the filesystem, the `temporary` file is removed.
        """
        try:
            yield
        except FileNotFoundError as error:
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one, or its folder"
                " was removed; what it was about to write was dropped."
            ) from error
        except OSError as error:
            if temporary is not None:
                self.tree.remove(temporary)
            if error.errno in NO_ROOM:
                raise OutputError(
                    f"There is no room left for the output {self.path!r}: {error}. Make room, and"
                    " run the same again to go on."
                ) from error
            raise

    def has_links(self) -> bool:
        """Whether the filesystem has hard links, as tried out."""
        source, target = self.temporary("probe"), self.temporary("probe")
        try:
            self.tree.creator(source).close()
            self.tree.link(source, target)
        except OSError as error:
            return error.errno not in _NO_LINKS
        finally:
            self.tree.remove(source)
            self.tree.remove(target)
        return True


def link_new(tree: Tree, temporary: str, final: str) -> bool:
    """Give a file its final name as well, or instead; False where that is taken."""
    try:
        tree.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if tree.exists(final):
            return False
        tree.rename(temporary, final)
    return True


def sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
