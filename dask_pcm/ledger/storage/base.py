"""The interface that outputs in folders and in object stores share.

``folder.py`` implements it for a folder of a filesystem, ``objects.py`` for an object store. Both
read and write files alike. What the two cannot do alike (fence a run, append to the log, commit a
part) each does in its own way, behind one interface.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, NamedTuple

import pyarrow as pa

from dask_pcm.ledger.journal.writer import Journal
from dask_pcm.ledger.layout import HOME
from dask_pcm.ledger.parts import Note


class Entry(NamedTuple):
    """A file in a listing; `stamp` changes with every write."""

    n_bytes: int
    stamp: str


@dataclass(frozen=True, slots=True)
class Storage(abc.ABC):
    """Files of an output, as one run reads and writes them. Names are relative to the output.

    Attributes
    ----------
    path
        An absolute path that driver and workers see, or a URL.
    run
        Identity of the run, new for each.
    owner
        Id of the user who drives the run.
    """

    path: str
    run: str
    # A default of the driver's process: pickled with the output, it names the driver's user on
    # workers, which may run as another one.
    owner: int = field(default_factory=os.geteuid, kw_only=True)

    #: Seconds between looks for requests, and between writes of the status.
    poll_s: ClassVar[float] = 0.25
    heartbeat_s: ClassVar[float] = 2.0
    #: Whether journals are cheap enough for every unit. Otherwise only units that were lost with
    #: their worker before have one.
    has_journals: ClassVar[bool] = False
    #: Whether a part of a fenced run can still appear.
    allows_late_commits: ClassVar[bool] = False

    @property
    def run_dir(self) -> str:
        """Name of the run directory."""
        return f"{HOME}/run-{self.run}"

    # -- files ------------------------------------------------------------------------------

    @abc.abstractmethod
    def entries(self, folder: str = "") -> dict[str, Entry]:
        """List a folder, sorted by name, folders with a trailing slash; empty if there is none."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def reader(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for reading; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of this name."""

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Replace a file atomically; FencedError if the run is fenced."""

    @abc.abstractmethod
    def move(self, name: str, target: str) -> None:
        """Move a file to another name, and make the folder that it needs."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content; do nothing if there is none."""

    # -- what each storage does in its own way ------------------------------------------------

    @property
    @abc.abstractmethod
    def fence(self) -> Fence:
        """The fence between this run and others of the output."""

    @property
    @abc.abstractmethod
    def log(self) -> Log:
        """The log of the output."""

    @abc.abstractmethod
    def committer(self, is_ours: Callable[[str], bool]) -> Committer:
        """Return what commits parts.

        `is_ours` returns whether the part under a name belongs to this output, and was not put
        late by a fenced run.
        """

    @abc.abstractmethod
    def open_journal(self, name: str, about: Mapping[str, Any]) -> Journal:
        """Create a journal; FencedError if the run is fenced."""

    @abc.abstractmethod
    def read_journal(self, name: str) -> bytes:
        """All that was written to a journal; FileNotFoundError if there is none."""


class Fence(abc.ABC):
    """How a run takes over, shows that it is alive, and is fenced."""

    @abc.abstractmethod
    def takeover_lock(self) -> AbstractContextManager[None]:
        """Lock that serialises takeovers: one run at a time checks for others and fences them."""

    @abc.abstractmethod
    def open_run(self, says: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Register as the output's writer, with `says` as ``driver.json``; on exit, fence the run.

        Entered while the takeover lock is held. Otherwise two runs could both see no other writer.
        """

    @abc.abstractmethod
    def is_alive(self, run: str, says: Mapping[str, Any] | None) -> bool:
        """Whether a run is at work; `says` is its ``driver.json``, None if it has none."""

    @abc.abstractmethod
    def fence_run(self, run: str) -> str:
        """Fence a run, so that it can commit nothing more; return its directory's new name."""


class Log(abc.ABC):
    """Lines about units and parts, kept for good."""

    @abc.abstractmethod
    def append(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        """Add a line; FencedError if the run is fenced.

        With `is_synced` the line also survives a loss of power.
        """

    @abc.abstractmethod
    def texts(self) -> Iterator[bytes]:
        """Every line as it was written, in no particular order."""


class Committer(abc.ABC):
    """How a part gets its name, such that the first of several attempts wins."""

    @property
    @abc.abstractmethod
    def method(self) -> str:
        """How the first attempt wins, in words."""

    @abc.abstractmethod
    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        """Write a part; see ``Output.commit``."""
