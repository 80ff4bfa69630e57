"""An output in a folder of a filesystem that driver and workers share.

A part is written in the run directory, synced, and then linked to its name (``commit.py``). Fencing
a run renames its directory (``fence.py``), so every later link of the run fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask_pcm.ledger.journal.writer import FileJournal
from dask_pcm.ledger.storage.commit import LinkCommitter
from dask_pcm.ledger.storage.fence import LockFence
from dask_pcm.ledger.storage.folder_files import FolderFiles
from dask_pcm.ledger.storage.log import FileLog


@dataclass(frozen=True, slots=True)
class Folder(FolderFiles):
    """An output in a folder."""

    @property
    def fence(self) -> LockFence:
        """Locks and renames."""
        return LockFence(self)

    @property
    def log(self) -> FileLog:
        """A file per process."""
        return FileLog(self)

    def committer(self, is_ours: Callable[[str], bool]) -> LinkCommitter:
        """Commits by hard links."""
        # No need of `is_ours`: the link of a fenced run fails, so a part is never late.
        return LinkCommitter(self)

    def open_journal(self, name: str, about: Mapping[str, Any]) -> FileJournal:
        """Create the journal's file; FencedError if the run is fenced."""
        with self.fenced():
            descriptor = self.create(name, os.O_WRONLY | os.O_APPEND)
        # Later appends need no look at the fence: a takeover reads what is there, and removes the
        # journal. What a fenced run still appends goes to a file without a name.
        return FileJournal(descriptor, name, about)

    def read_journal(self, name: str) -> bytes:
        """Read the journal's file."""
        return self.read(name)
