"""Files of an output in a folder, written such that the writes of a fenced run fail.

Every file of a run is created in the run directory, and linked or renamed from there. Fencing the
run renames that directory, so every later link or rename fails by itself. A check of the fence
before each write would leave a moment between check and write; here there is none.
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

#: Raised if a folder, or a file in it, does not exist.
NO_FOLDER = (FileNotFoundError, NotADirectoryError)
#: Errors of ``link(2)`` on filesystems without hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
#: Characters of a file's name that its temporary name repeats; names have 255 bytes at most.
_MAX_STEM = 100


@dataclass(frozen=True, slots=True)
class FolderFiles(Storage):
    """Files of an output in a folder.

    Attributes
    ----------
    is_guarded
        Whether folders of other users are refused below ``_pcm``; see ``Tree``.
    """

    has_journals = True
    is_guarded: bool = field(default=True, kw_only=True)

    @property
    def tree(self) -> Tree:
        """The folder, accessed without following links."""
        return Tree(self.path, self.is_guarded, self.owner)

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """List a folder; the stamp of a file is its time in nanoseconds."""
        found = {}
        with contextlib.suppress(*NO_FOLDER):
            for name, status in self.tree.entries(folder):
                shown = f"{name}/" if stat.S_ISDIR(status.st_mode) else name
                found[shown] = Entry(status.st_size, str(status.st_mtime_ns))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        """Read a file."""
        with self.tree.reader(name) as file:
            return file.read()

    def reader(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return self.tree.reader(name)

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name."""
        return self.tree.exists(name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file in the run directory, sync it, and rename it to its name."""
        temporary, tree = self.temporary(os.path.basename(name)), self.tree
        with self.fenced(temporary):
            with tree.creator(temporary) as file:
                file.write(data)
                # Content before name: renamed first, a file could be empty after a loss of power.
                sync_file(file)
            tree.rename(temporary, name)
            tree.sync_folder(os.path.dirname(name))

    def move(self, name: str, target: str) -> None:
        """Rename a file, and make the folder that it needs."""
        self.tree.make_folder(os.path.dirname(target))
        self.tree.rename(name, target)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content."""
        self.tree.remove(name)

    def create(self, name: str, flags: int) -> int:
        """Create a file unless the run is fenced, and open it; return its descriptor.

        Like a part, the file is created in the run directory and linked from there. So no file
        appears after the run is fenced, however long each of these calls takes.
        """
        temporary, tree = self.temporary(os.path.basename(name)), self.tree
        try:
            tree.creator(temporary).close()
            # Threads of a process share their log file: if another thread was first, its is used.
            link_new(tree, temporary, name)
        finally:
            tree.remove(temporary)
        tree.sync_folder(os.path.dirname(name))
        return tree.open(name, flags)

    def temporary(self, name: str) -> str:
        """A unique name in the run directory for what will become `name`."""
        own = f"{name[:_MAX_STEM]}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        return f"{self.run_dir}/{own}"

    @contextlib.contextmanager
    def fenced(self, temporary: str | None = None) -> Iterator[None]:
        """Turn errors of writes into ours, and remove the `temporary` file.

        Raises
        ------
        FencedError
            If the run directory does not exist.
        OutputError
            If the disk is full.
        """
        try:
            yield
        except FileNotFoundError as error:
            # Nothing to remove: the takeover removes the directory, and the file with it.
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one, or its folder"
                " was removed; its unwritten results were dropped."
            ) from error
        except OSError as error:
            if temporary is not None:
                self.tree.remove(temporary)
            if error.errno in NO_ROOM:
                raise OutputError(
                    f"There is no room left for the output {self.path!r}: {error}. Free some"
                    " space, and rerun the same call to resume."
                ) from error
            raise

    def has_links(self) -> bool:
        """Whether the filesystem has hard links, by a trial."""
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
    """Give a file its final name; False if that is taken.

    Without hard links the file is renamed, and a second writer that comes between the check and
    the rename replaces the first one's file. Either is a whole file.
    """
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
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())
