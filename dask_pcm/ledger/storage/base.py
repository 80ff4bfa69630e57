"""What every storage of an output does, as one run sees it."""

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
    """A file as a listing shows it; `stamp` changes with every write."""

    n_bytes: int
    stamp: str


@dataclass(frozen=True, slots=True)
class Storage(abc.ABC):
    """Files of an output, as one run reads and writes them. Names are relative to the output.

    Attributes
    ----------
    path
        Where it is: an absolute path that driver and workers see, or a URL.
    run
        Identity of the run, new for each.
    owner
        The user who drives the run.
    """

    path: str
    run: str
    owner: int = field(default_factory=os.geteuid, kw_only=True)

    #: How often a run looks for requests, and writes its status.
    poll_s: ClassVar[float] = 0.25
    heartbeat_s: ClassVar[float] = 2.0
    #: Whether a journal costs so little that every unit has one; elsewhere only units that were
    #: lost with their worker have.
    has_journals: ClassVar[bool] = False
    #: Whether a part of a fenced run may still arrive.
    allows_late_commits: ClassVar[bool] = False

    @property
    def run_dir(self) -> str:
        """The folder of this run."""
        return f"{HOME}/run-{self.run}"

    # -- files ------------------------------------------------------------------------------

    @abc.abstractmethod
    def entries(self, folder: str = "") -> dict[str, Entry]:
        """Names in a folder, sorted, folders with a slash at their end; none if there is none."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def reader(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file, open for reading; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool: ...

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Replace a file atomically; FencedError where the run was replaced."""

    @abc.abstractmethod
    def move(self, name: str, target: str) -> None: ...

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing if there is none."""

    # -- what each storage does in a way of its own -------------------------------------------

    @property
    @abc.abstractmethod
    def fence(self) -> Fence: ...

    @property
    @abc.abstractmethod
    def log(self) -> Log: ...

    @abc.abstractmethod
    def committer(self, is_ours: Callable[[str], bool]) -> Committer:
        """What commits parts.

        `is_ours` tells whether the part that stands under a name belongs to this output, and did
        not arrive late from a run that was fenced.
        """

    @abc.abstractmethod
    def open_journal(self, name: str, about: Mapping[str, Any]) -> Journal:
        """A new journal; FencedError where the run was replaced."""

    @abc.abstractmethod
    def read_journal(self, name: str) -> bytes:
        """All that was written to a journal; FileNotFoundError if there is none."""


class Fence(abc.ABC):
    """How a run takes over, shows that it is alive, and is shut out."""

    @abc.abstractmethod
    def takeover_lock(self) -> AbstractContextManager[None]:
        """Of several runs that begin at once, one at a time looks and takes over."""

    @abc.abstractmethod
    def open_run(self, says: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Register this run, as `says` tells others; on exit, fence it."""

    @abc.abstractmethod
    def is_alive(self, run: str, says: Mapping[str, Any] | None) -> bool:
        """Whether a run is at work that says this of its driver; None if it says nothing."""

    @abc.abstractmethod
    def fence_run(self, run: str) -> str:
        """Take a run's folder from it, so that it can commit nothing more; return its new name."""


class Log(abc.ABC):
    """Lines about units and parts, kept for good."""

    @abc.abstractmethod
    def append(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        """Add a line; FencedError where the run was replaced.

        If it `is_synced`, it also survives a loss of power, where that takes an effort.
        """

    @abc.abstractmethod
    def texts(self) -> Iterator[bytes]:
        """Every line, in no order, as it stands there."""


class Committer(abc.ABC):
    """How a part comes to stand under its name."""

    @property
    @abc.abstractmethod
    def method(self) -> str:
        """How the first writer of a part wins, in words."""

    @abc.abstractmethod
    def commit(
        self, name: str, tables: Iterable[pa.Table], note: Note, replaces: bool = False
    ) -> bool:
        """Write a part; see ``Output.commit``."""
