"""How a part gets its name, once: by a hard link, or by a conditional put.

Either way the line of the log comes before the part. A part without a line would have to be read as
a whole by the next inventory; a line without a part costs nothing.
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
    """Links a part to its name: ``link(2)`` never replaces a file.

    On a filesystem without hard links, a part is renamed unless its name is taken. Of two attempts
    at one unit that finish at the same time, the later then replaces the part of the earlier.
    Either is a complete part of that unit.
    """

    files: FolderFiles

    @property
    def method(self) -> str:
        """``hard links``, or that there are none, by a trial."""
        has_links = self.files.has_links()
        return "hard links" if has_links else "renaming (there are no hard links here)"

    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        """Write a part in the run directory, sync it, and link it to its name."""
        files, tree, temporary = self.files, self.files.tree, self.files.temporary(name)
        try:
            # Synced in this order: content, line of the log, name. So after a loss of power, a part
            # that has its name is complete and has its line.
            with files.fenced(temporary), tree.creator(temporary) as file:
                n_bytes, told = write_part(file, name, tables, note)
                sync_file(file)
                # A link or rename keeps the time, so the line can have that of the part.
                stamp = str(os.fstat(file.fileno()).st_mtime_ns)
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
        Whether there is a part under a name that was not put late by a fenced run. One that was
        late is replaced.
    """

    files: ObjectFiles
    is_ours: Callable[[str], bool]

    @property
    def method(self) -> str:
        """``conditional put``, or the folder of the lock files."""
        locks = self.files.locks
        return f"lock files in {locks}" if locks else "conditional put"

    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        """Encode a part in memory, and put it if its name is free."""
        # In memory, since a put takes the whole object.
        buffer, files = io.BytesIO(), self.files
        n_bytes, told = write_part(buffer, name, tables, note)
        data = buffer.getvalue()
        # Appending the line checks the fence, right before the put.
        files.log.append(commit_line(files.run, name, n_bytes, told, ""))
        if replaces:
            files.put(name, data)
        elif files.locks:
            if not self._put_locked(name, data):
                return False
        elif not files.create(name, data):
            if self.is_ours(name):
                return False
            # Late, of a fenced run: nothing of the current output is lost by replacing it.
            files.put(name, data)
        # The stamp is known only now. Without this line the part is committed all the same, and is
        # read as a whole by the next inventory.
        with contextlib.suppress(FencedError, OSError):
            stamp = stamp_of(files.fs.info(files.url(name), refresh=True))
            files.log.append(commit_line(files.run, name, n_bytes, told, stamp))
        return True

    def _put_locked(self, name: str, data: bytes) -> bool:
        """Put a part under a lock file; False if it exists, or appears while this waits."""
        files = self.files
        while not self.is_ours(name):
            with files.lock_files.hold(name) as is_held:
                if is_held:
                    # Look again: the previous holder may have put the part and released the lock
                    # since the loop looked.
                    if self.is_ours(name):
                        return False
                    # Waiting for the lock may have taken long.
                    files.check_fence()
                    files.put(name, data)
                    return True
            time.sleep(POLL_S)
        return False
