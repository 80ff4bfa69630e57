"""The output of a job as one run sees it: its parts, and its JSON files.

Where its files are is in ``storage/``, how they are named in ``layout.py``. What else is done with
an output has a module each: ``takeover.py`` fences other runs, ``stash.py`` makes room for another
job, ``log.py`` and ``unit_journals.py`` record what happens, ``inventory.py`` counts what is there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.errors import OutputError, shown_cause
from dask_pcm.ledger.decode import parse
from dask_pcm.ledger.layout import HOME
from dask_pcm.ledger.parts import Note, note_of, parse_name
from dask_pcm.ledger.storage.base import Committer, Entry, Storage
from dask_pcm.paths import path_text

logger = logging.getLogger(__name__)

#: Our folder, and what ``mkfs`` makes at the root of a filesystem.
_OWN_FOLDERS = frozenset({f"{HOME}/", "lost+found/"})


@dataclass(frozen=True, slots=True)
class Output:
    """An output; pickled to the workers. Names are relative to it.

    Attributes
    ----------
    storage
        Its files, as this run reads and writes them.
    generation
        Identity of the output since it was last overwritten. Every part, journal and line of the
        log carries it (as ``begun``). So what a fenced run of an overwritten job still writes is
        recognised.
    """

    storage: Storage
    generation: str = ""

    @property
    def path(self) -> str:
        """An absolute path, or a URL."""
        return self.storage.path

    @property
    def run(self) -> str:
        """Identity of the run."""
        return self.storage.run

    @property
    def run_dir(self) -> str:
        """Name of the run directory."""
        return self.storage.run_dir

    def as_run(self, run: str) -> Output:
        """Return the same output as another run sees it."""
        return replace(self, storage=replace(self.storage, run=run))

    def is_current(self, note: Mapping[str, Any]) -> bool:
        """Whether a part with this note, or a line of the log, is of the current generation."""
        # Outputs of versions without generations have none in their notes.
        return str(note.get("begun", "")) == self.generation

    # -- parts ------------------------------------------------------------------------------

    @property
    def commit_method(self) -> str:
        """How the first of several attempts at a part wins, in words."""
        return self._committer.method

    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        """Write a part; return False if another attempt was first.

        Parameters
        ----------
        name
            Name of the part.
        tables
            Its rows: at least one table, possibly a generator that computes them.
        note
            Called when all `tables` are written; returns what is noted in the part.
        replaces
            Whether a part of this name is replaced instead.

        Raises
        ------
        FencedError
            If a newer run has taken over this output.
        OutputError
            If the disk is full, or the store does not answer.
        """
        return self._committer.commit(name, tables, note, replaces)

    @property
    def _committer(self) -> Committer:
        def is_ours(name: str) -> bool:
            return self.storage.exists(name) and self.is_current(self.read_note(name))

        return self.storage.committer(is_ours)

    def parts(self) -> dict[str, Entry]:
        """The parts by name, in input order."""
        return {k: v for k, v in self.storage.entries().items() if parse_name(k) is not None}

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read the rows of a part; FileNotFoundError if there is none."""
        with self.storage.reader(name) as file, pq.ParquetFile(file) as part:
            return part.read(columns)

    def read_note(self, name: str) -> dict[str, Any]:
        """The note of a part; empty if it was not written by dask_pcm.

        Raises
        ------
        FileNotFoundError
            If there is no such part.
        OutputError
            If it cannot be read.
        """
        try:
            with self.storage.reader(name) as file, pq.ParquetFile(file) as part:
                return note_of(part.metadata)
        except FileNotFoundError:
            # Also an OSError; callers tell a missing part from a damaged one.
            raise
        except (OSError, ValueError) as error:
            raise OutputError(
                f"The part {name!r} in {self.path!r} cannot be read ({error}). Remove it; its rows"
                " are then computed again."
            ) from shown_cause(error)

    def foreign_files(self) -> list[str]:
        """Names of files that were not written by dask_pcm; hidden files do not count."""
        # File browsers and network filesystems leave hidden files in any folder.
        names = (name for name in self.storage.entries() if not name.startswith("."))
        return [name for name in names if name not in _OWN_FOLDERS and parse_name(name) is None]

    # -- JSON -------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file atomically; FencedError if the run is fenced."""
        self.storage.write(name, json.dumps(value, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """Read a JSON file; None if there is none.

        Raises
        ------
        OutputError
            If it cannot be read, or is damaged.
        """
        try:
            return parse(self.storage.read(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(
                f"{name!r} in {self.path!r} cannot be read now: {error}."
            ) from shown_cause(error)
        except ValueError as error:
            raise OutputError(
                f"{name!r} in {self.path!r} is damaged ({error}). Give another output folder, or"
                " overwrite this one (overwrite=True, --overwrite)."
            ) from shown_cause(error)

    def read_told(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object that is informational only; None if there is none.

        If it is damaged or not an object, the result is empty: no decision depends on it.
        """
        try:
            found = self.read_json(name)
        except OutputError as error:
            logger.warning("%s", error)
            return {}
        if found is None or isinstance(found, dict):
            return found
        logger.warning("%s in %s is not a JSON object, and is ignored", name, self.path)
        return {}


def local_path(path: str | os.PathLike[str]) -> str | None:
    """Absolute path in the local filesystem; None if the path is a URL of another."""
    text = path_text(path).removeprefix("file://")
    return None if "://" in text else os.path.abspath(os.path.expanduser(text))
