"""How a part comes to stand under its name, once: two ways.

Either way the log tells of a part before it is there: of a part that nobody noted all bytes have to
be read, while a line without its part costs nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa

from dask_pcm.errors import FencedError
from dask_pcm.ledger.log_lines import commit_line
from dask_pcm.ledger.parts import Note, write_part
from dask_pcm.ledger.storage.base import Committer
from dask_pcm.ledger.storage.folder_files import FolderFiles, link_new, sync_file
from dask_pcm.ledger.storage.lock_files import POLL_S
from dask_pcm.ledger.storage.object_files import ObjectFiles, stamp_of


@dataclass(frozen=True, slots=True)
class LinkCommitter(Committer):
    """Links a part to its name: ``link(2)`` refuses to replace a file.

    Where the filesystem has no hard links, a part is renamed to its name unless that is there. Two
    attempts at one unit can then both write, one after the other; what stands there is always one
    whole part of that unit.
    """

    files: FolderFiles

    @property
    def method(self) -> str:
        has_links = self.files.has_links()
        return "hard links" if has_links else "renaming (there are no hard links here)"

    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        files, tree, temporary = self.files, self.files.tree, self.files.temporary(name)
        try:
            with files.fenced(temporary), tree.creator(temporary) as file:
                n_bytes, told = write_part(file, name, tables, note)
                sync_file(file)
                stamp = str(os.fstat(file.fileno()).st_mtime_ns)
            # Before it is there, and synced as it is: else many would have to be read through.
            files.log.append(commit_line(files.run, name, n_bytes, told, stamp), is_synced=True)
            with files.fenced(temporary):
                if replaces:
                    tree.rename(temporary, name)
                elif not link_new(tree, temporary, name):
                    return False
        finally:
            tree.remove(temporary)
        tree.sync_folder()
        return True


@dataclass(frozen=True, slots=True)
class PutCommitter(Committer):
    """Puts a part conditionally, or under a lock file.

    Attributes
    ----------
    is_ours
        Whether a part is there that did not arrive late from a run that was fenced; one that did
        is replaced.
    """

    files: ObjectFiles
    is_ours: Callable[[str], bool]

    @property
    def method(self) -> str:
        locks = self.files.locks
        return f"lock files in {locks}" if locks else "conditional put"

    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        buffer, files = io.BytesIO(), self.files
        n_bytes, told = write_part(buffer, name, tables, note)
        data = buffer.getvalue()
        files.log.append(commit_line(files.run, name, n_bytes, told, ""))
        if replaces:
            files.put(name, data)
        elif files.locks:
            if not self._put_locked(name, data):
                return False
        elif not files.create(name, data):
            if self.is_ours(name):
                return False
            files.put(name, data)
        with contextlib.suppress(FencedError, OSError):  # it only saves reading it through
            stamp = stamp_of(files.fs.info(files.url(name), refresh=True))
            files.log.append(commit_line(files.run, name, n_bytes, told, stamp))
        return True

    def _put_locked(self, name: str, data: bytes) -> bool:
        """Put a part under a lock file; False if it is there, or comes while we wait for it."""
        files = self.files
        while not self.is_ours(name):
            with files.lock_files.hold(name) as is_held:
                if is_held:
                    if self.is_ours(name):  # put by whoever held the lock before us
                        return False
                    files.check_fence()
                    files.put(name, data)
                    return True
            time.sleep(POLL_S)
        return False
