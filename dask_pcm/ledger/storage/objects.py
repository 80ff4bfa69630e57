"""An output in an object store, by any fsspec URL.

A part is put under its name only if there is none yet: by a conditional put, if the store has it.
Otherwise the worker that creates the unit's lock file, in a folder that all workers share, may put
the part (``commit.py``). A lock that is not refreshed is taken over.

Nothing can be renamed atomically. A run is fenced by removing its ``driver.json``; each unit checks
for it right before it puts its part. A put that was under way at that moment can still succeed. The
new run finds such a part before it ends, and removes it (see ``inventory.py``).

Nothing can be appended to, either: only units that were lost with their worker before have a
journal, of small objects.

A run counts as alive as long as its ``status.json`` is being written, by the store's own clock.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_pcm.errors import OutputError, shown_cause
from dask_pcm.ledger.journal.writer import Journal, ObjectJournal
from dask_pcm.ledger.layout import HOME
from dask_pcm.ledger.storage.commit import PutCommitter
from dask_pcm.ledger.storage.fence import StatusFence
from dask_pcm.ledger.storage.log import ObjectLog
from dask_pcm.ledger.storage.object_files import CONDITIONAL, ObjectFiles, protocol_of


@dataclass(frozen=True, slots=True)
class Objects(ObjectFiles):
    """An output in an object store."""

    @classmethod
    def at(cls, url: str, locks: str | None) -> Objects:
        """Open the output at a URL; without `locks`, test that the store puts conditionally.

        Raises
        ------
        OutputError
            If it does not and no folder for lock files is given, or if it cannot be reached.
        """
        storage = cls(url.rstrip("/"), uuid.uuid4().hex, locks and os.path.abspath(locks))
        try:
            if storage.locks:
                Path(storage.locks).mkdir(parents=True, exist_ok=True)
                storage.put(f"{HOME}/probe-{storage.run}", b"1")
                storage.remove(f"{HOME}/probe-{storage.run}")
                return storage
            is_conditional = storage._puts_conditionally()
        except OutputError:
            raise
        except Exception as error:  # each store's client has exceptions of its own
            raise OutputError(
                f"Cannot write to the output {url!r}: {type(error).__name__}: {error}."
            ) from shown_cause(error)
        if not is_conditional:
            raise OutputError(
                f"The store of {url!r} cannot put an object only if there is none yet, so two"
                " workers could write one part. Give a folder for lock files that driver and"
                " workers share: lock_folder=..., --lock-folder."
            )
        return storage

    def _puts_conditionally(self) -> bool:
        # By a trial, not by protocol alone: some S3 servers ignore the condition and replace.
        if protocol_of(self.path) not in CONDITIONAL:
            return False
        probe = f"{HOME}/probe-{self.run}"
        try:
            return self.create(probe, b"1") and not self.create(probe, b"2")
        finally:
            self.remove(probe)

    @property
    def fence(self) -> StatusFence:
        """``driver.json`` and the status's age."""
        return StatusFence(self)

    @property
    def log(self) -> ObjectLog:
        """An object per line."""
        return ObjectLog(self)

    def committer(self, is_ours: Callable[[str], bool]) -> PutCommitter:
        """Commits by conditional puts, or under lock files."""
        return PutCommitter(self, is_ours)

    def open_journal(self, name: str, about: Mapping[str, Any]) -> Journal:
        """Begin a journal of numbered objects; FencedError if the run is fenced."""
        return ObjectJournal(self.write, name, about)

    def read_journal(self, name: str) -> bytes:
        """Join the journal's objects, in the order of writing."""
        return b"".join(self.read(f"{name}/{number}") for number in self.entries(name))
