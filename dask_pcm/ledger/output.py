"""The output of a job as one run sees it: its parts, and its JSON files.

What it is made of stands in ``storage.py``. What is done with it beside: ``fence.py`` takes over,
``stash.py`` makes room for another job, ``log.py`` and ``journals.py`` keep what happened.
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

#: Ours, and what a filesystem puts at its root.
_OWN_FOLDERS = frozenset({f"{HOME}/", "lost+found/"})


@dataclass(frozen=True, slots=True)
class Output:
    """An output; travels to the workers. Names are relative to it.

    Attributes
    ----------
    storage
        Where its files are, as this run reads and writes them.
    generation
        Identity of the output since it was last begun anew; every part and every line carries it
        (as ``begun``), so that those of a run that was fenced then are told from its own.
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
        """The folder of this run."""
        return self.storage.run_dir

    def as_run(self, run: str) -> Output:
        """The same output as another run sees it."""
        return replace(self, storage=replace(self.storage, run=run))

    def is_current(self, note: Mapping[str, Any]) -> bool:
        """Whether a part with this note, or a line of the log, belongs to the output as it is."""
        return str(note.get("begun", "")) == self.generation

    # -- parts ------------------------------------------------------------------------------

    @property
    def commit_method(self) -> str:
        """How the first writer of a part wins, in words."""
        return self._committer.method

    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        """Write a part; False where another attempt was first (and is not to be replaced).

        `note` is called when all `tables` are written.

        Raises
        ------
        FencedError
            Where a newer run has taken over this output.
        OutputError
            Where there is no room left.
        """
        return self._committer.commit(name, tables, note, replaces)

    @property
    def _committer(self) -> Committer:
        def is_ours(name: str) -> bool:
            return self.storage.exists(name) and self.is_current(self.read_note(name))

        return self.storage.committer(is_ours)

    def parts(self) -> dict[str, Entry]:
        """The parts, in input order."""
        return {k: v for k, v in self.storage.entries().items() if parse_name(k) is not None}

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.storage.reader(name) as file, pq.ParquetFile(file) as part:
            return part.read(columns)

    def read_note(self, name: str) -> dict[str, Any]:
        """What ``commit`` noted in a part; empty where it was not written by us.

        Raises
        ------
        FileNotFoundError
            Where there is no such part.
        OutputError
            Where it cannot be read.
        """
        try:
            with self.storage.reader(name) as file, pq.ParquetFile(file) as part:
                return note_of(part.metadata)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise OutputError(
                f"The part {name!r} in {self.path!r} cannot be read ({error}). Remove it, and its"
                " rows are computed again."
            ) from shown_cause(error)

    def foreign_files(self) -> list[str]:
        """Names of files that are not ours; hidden ones do not count."""
        names = (name for name in self.storage.entries() if not name.startswith("."))
        return [name for name in names if name not in _OWN_FOLDERS and parse_name(name) is None]

    # -- JSON -------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> None:
        self.storage.write(name, json.dumps(value, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """A JSON file; None if there is none.

        Raises
        ------
        OutputError
            Where it cannot be read.
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
        """A JSON object that only tells how things stand; None if there is none.

        One that is damaged or something else is empty: nothing depends on it.
        """
        try:
            found = self.read_json(name)
        except OutputError as error:
            logger.warning("%s", error)
            return {}
        if found is None or isinstance(found, dict):
            return found
        logger.warning("%s in %s is no JSON object, and is not looked at", name, self.path)
        return {}


def local_path(path: str | os.PathLike[str]) -> str | None:
    """A path of the filesystem, absolute; None if it is a URL of something else."""
    text = path_text(path).removeprefix("file://")
    return None if "://" in text else os.path.abspath(os.path.expanduser(text))
