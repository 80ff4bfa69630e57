"""The output as one run sees it: its parts, and the ledger's own files under ``_pcm/``.

``OUTPUT/part-<first row>-<end row>.parquet`` holds the rows of the input from the first to the
one before the end, counted over the whole input, so that names sort in input order and units of
another size in another run fit between. Under ``OUTPUT/_pcm/`` lie:

``manifest.json``
    Which job this is; see ``manifest.py``.
``run-<id>/``
    What belongs to the run at work: who drives it (``driver.json``), how it stands
    (``status.json``), what is asked of it (``pause``, ``cancel``), what an overwriting run has set
    aside (``aside/``), and its temporary files. Whoever takes over removes it first, and from then
    on the old run can commit nothing: it is fenced off.
``log/``
    A line for each unit that was started and for each part that was committed.
``journal/``
    Finished rows of units that are not committed yet, and what rows have cost in processes; see
    ``journal.py``.
``report.json``
    The report of the last run.
``lock`` (in object stores ``lock-<number>``)
    Held while a run looks whether it may begin, and takes over.

``folder.py`` keeps all this in a folder of a filesystem, ``objects.py`` in an object store.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.errors import OutputError, shown_cause
from dask_pcm.ledger.decode import parse
from dask_pcm.ledger.journal import Found, Journal, read_journal
from dask_pcm.ledger.log import parse_line
from dask_pcm.ledger.parts import Note, is_intact, note_of, parse_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.status import Writer
from dask_pcm.paths import path_text

logger = logging.getLogger(__name__)

HOME = "_pcm"
MANIFEST, REPORT, LOG = f"{HOME}/manifest.json", f"{HOME}/report.json", f"{HOME}/log"
JOURNAL = f"{HOME}/journal"
PAUSE, CANCEL = "pause", "cancel"
_ASIDE = "aside"
#: Ours, and what a filesystem puts at its root.
_OWN_FOLDERS = frozenset({f"{HOME}/", "lost+found/"})


class Entry(NamedTuple):
    """A file as a listing shows it; `stamp` changes with every write."""

    n_bytes: int
    stamp: str


@dataclass(frozen=True, slots=True)
class Output(abc.ABC):
    """An output; travels to the workers. Names are relative to it.

    Attributes
    ----------
    path
        Where it is: an absolute path that driver and workers see, or a URL.
    run
        Identity of the run, new for each.
    generation
        Identity of the output since it was last begun anew; every part and every line carries it,
        so that those of a run that was shut out then are told from its own.
    owner
        The user who drives the run.
    """

    path: str
    run: str
    generation: str = field(default="", kw_only=True)
    owner: int = field(default_factory=os.geteuid, kw_only=True)

    #: How often a run looks at what is asked of it, and says how it stands.
    poll_s: ClassVar[float] = 0.25
    heartbeat_s: ClassVar[float] = 2.0
    #: Whether noting finished rows of a unit, batch by batch, costs so little that it is done for
    #: every unit; elsewhere only for those that were lost with their worker.
    has_journals: ClassVar[bool] = False
    #: Whether a part of a run that was shut out may still arrive.
    allows_late_commits: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def commit_method(self) -> str:
        """How the first writer of a part wins, in words."""

    # -- files ------------------------------------------------------------------------------

    @abc.abstractmethod
    def entries(self, folder: str = "") -> dict[str, Entry]:
        """Names in a folder, sorted, folders with a slash at their end; none if there is none."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Replace a file in one step; FencedError where the run was replaced."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool: ...

    @abc.abstractmethod
    def move(self, name: str, target: str) -> None: ...

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing if there is none."""

    # -- runs -------------------------------------------------------------------------------

    @abc.abstractmethod
    def takeover_lock(self) -> AbstractContextManager[None]:
        """Of several runs that begin at once, one at a time looks and takes over."""

    @abc.abstractmethod
    def open(self, says: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Be at work, as `says` tells others; on leaving, nothing of this run can commit."""

    @abc.abstractmethod
    def other_runs(self) -> list[Writer]:
        """Other runs that are at work, or were and left their things."""

    @abc.abstractmethod
    def fence_run(self, run: str) -> str:
        """Take a run's folder from it, so that it can commit nothing more; return its new name."""

    # -- parts ------------------------------------------------------------------------------

    @abc.abstractmethod
    def commit(
        self,
        name: str,
        tables: Iterable[pa.Table],
        note: Note,
        replaces: bool = False,
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

    @abc.abstractmethod
    def open_part(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A part, open for reading; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def log(self, line: Mapping[str, Any]) -> None:
        """Note something for good; FencedError where the run was replaced."""

    @abc.abstractmethod
    def log_texts(self) -> Iterator[bytes]:
        """Everything that was ever noted here, in no order, as it stands there."""

    @abc.abstractmethod
    def begin_journal(self, unit: str, origin: Mapping[str, Any]) -> Journal:
        """A new journal for an attempt at a unit.

        `origin` is what a part would tell of where it comes from.

        Raises
        ------
        FencedError
            Where a newer run has taken over this output.
        """

    @abc.abstractmethod
    def read_journal(self, name: str) -> bytes:
        """All that was written to a journal; FileNotFoundError if there is none."""

    def as_run(self, run: str) -> Self:
        """The same output as another run sees it."""
        return dataclasses.replace(self, run=run)

    # -- what follows from these --------------------------------------------------------------

    def is_current(self, note: Mapping[str, Any]) -> bool:
        """Whether a part with this note, or a line of the log, belongs to the output as it is."""
        return str(note.get("begun", "")) == self.generation

    @property
    def run_dir(self) -> str:
        """The folder of this run."""
        return f"{HOME}/run-{self.run}"

    def parts(self) -> dict[str, Entry]:
        """The parts, in input order."""
        return {k: v for k, v in self.entries().items() if parse_name(k) is not None}

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.open_part(name) as file, pq.ParquetFile(file) as part:
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
            with self.open_part(name) as file, pq.ParquetFile(file) as part:
                return note_of(part.metadata)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise OutputError(
                f"The part {name!r} in {self.path!r} cannot be read ({error}). Remove it, and its"
                " rows are computed again."
            ) from shown_cause(error)

    def is_intact(self, name: str, note: Mapping[str, Any]) -> bool:
        """Whether a part is as it was committed with this note; reads it through."""
        with self.open_part(name) as file:
            return is_intact(file, note)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Everything that was ever noted here, in no order; damaged lines are left out."""
        return (line for line in map(parse_line, self.log_texts()) if line is not None)

    def foreign_files(self) -> list[str]:
        """Names of files that are not ours; hidden ones are nobody's business."""
        names = (name for name in self.entries() if not name.startswith("."))
        return [name for name in names if name not in _OWN_FOLDERS and parse_name(name) is None]

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """A JSON file; None if there is none.

        Raises
        ------
        OutputError
            Where it cannot be read.
        """
        try:
            return parse(self.read(name))
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

    def read_driver(self, run: str) -> dict[str, Any] | None:
        """What a run says of its driver; None if it is gone, empty if it cannot be read."""
        return self.read_told(f"{HOME}/run-{run}/driver.json")

    def note_start(self, unit: str, n_rows: int | None) -> None:
        """Note that a unit begins whose rows are computed as a whole."""
        self.log({"run": self.run, "start": unit, "rows": n_rows})

    def note_called(self, rows: Iterable[Range], journal: str | None, run: str) -> None:
        """Note rows that a function by rows was called on, by an attempt of a run.

        What the same journal tells counts once, however many note it.
        """
        if ranges := list(Ranges(rows)):
            self.log({"run": run, "called": ranges, "journal": journal})

    def journal_names(self, unit: str | None = None) -> list[str]:
        """Journals that attempts at a unit, or at any, have left."""
        names = (name.rstrip("/") for name in self.entries(JOURNAL))
        return [f"{JOURNAL}/{n}" for n in names if unit is None or n.startswith(f"{unit}.")]

    def journals(self, unit: str | None = None) -> Iterator[tuple[str, Found | None]]:
        """What they hold, by their names; None for one of no use."""
        for name in self.journal_names(unit):
            with contextlib.suppress(FileNotFoundError):  # who left it has committed after all
                found = read_journal(self.read_journal(name))
                is_ours = found is not None and self.is_current(found.about)
                own = name.removeprefix(f"{JOURNAL}/")
                yield name, found if found and is_ours and found.is_named(own) else None

    def requests(self) -> frozenset[str]:
        """What is asked of this run: to pause, to cancel."""
        return frozenset(self.entries(self.run_dir)) & {PAUSE, CANCEL}

    def fence(self, include_alive: bool = True) -> None:
        """Shut out every other run: none of them can commit once this returns.

        What a run had set aside, and came to nothing, is put back. Unless `include_alive` are meant
        too, only of runs whose driver is gone.
        """
        for owner in self.other_runs():
            if include_alive or not owner.is_alive:
                self._restore(self.fence_run(owner.run))
        for name in self.entries(HOME):
            if name.startswith(("old-", "new-")) and name.endswith(
                "/"
            ):  # whoever made it did not live to go on
                self._restore(f"{HOME}/{name[:-1]}")

    def stash(self) -> None:
        """Move what another job left out of the way; it is there until `drop_aside`.

        The manifest goes first, and comes back last. So, wherever this or ``_restore`` is killed,
        a manifest beside things set aside is that of a new job, and without one it is to be put
        back.
        """
        for name in [*self._job_files(), *self.parts()]:
            with contextlib.suppress(FileNotFoundError):
                self.move(name, f"{self.run_dir}/{_ASIDE}/{name}")

    def drop_aside(self) -> None:
        """There is something new now: what another job left may go."""
        self.remove(f"{self.run_dir}/{_ASIDE}")

    def unstash(self) -> None:
        """Nothing new came of this run: what it set aside stands again where it stood.

        Ends this run. Where a unit has committed after all, the new job stays instead.
        """
        with self.takeover_lock():
            if next(_walk(self, f"{self.run_dir}/{_ASIDE}"), None):
                self._restore(self.fence_run(self.run))  # first: from now on none of it commits

    def _restore(self, place: str) -> None:
        """Put back what a run that was shut out had set aside, and remove the rest of it.

        Killed at any point, it goes on where it was when it is called again.
        """
        aside = f"{place}/{_ASIDE}"
        kept = list(_walk(self, aside))
        if kept and self.exists(MANIFEST):
            if any(parse_name(name) != (0, 0) for name in self.parts()):
                kept = []  # something has come of the new job
            else:
                for name in reversed([*self._job_files(), *self.parts()]):
                    self.remove(name)
        for name in sorted(kept, key=lambda name: name == MANIFEST):
            self.move(f"{aside}/{name}", name)
        self.remove(place)

    def _job_files(self) -> list[str]:
        lines = [f"{folder}/{n}" for folder in (LOG, JOURNAL) for n in _walk(self, folder)]
        return [*(name for name in (MANIFEST, REPORT) if self.exists(name)), *lines]


def _walk(output: Output, folder: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it."""
    for name in output.entries(folder):
        if name.endswith("/"):
            yield from (f"{name}{below}" for below in _walk(output, f"{folder}/{name[:-1]}"))
        else:
            yield name


def local_path(path: str | os.PathLike[str]) -> str | None:
    """A path of the filesystem, absolute; None if it is a URL of something else."""
    text = path_text(path).removeprefix("file://")
    return None if "://" in text else os.path.abspath(os.path.expanduser(text))
