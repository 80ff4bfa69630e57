"""Writing a journal, so that a killed process loses at most the batch that it was computing.

Each finished batch is appended to the unit's journal,
``OUTPUT/_pcm/journal/<name of the part>.<run>.<attempt>``. The next attempt at the unit copies what
earlier journals hold; a later run commits it.

A journal also records progress within the unit: rows that were begun, that wait for a context, and
that were passed to the function; and drafts of rows in flight, such as the tokens of texts that are
being generated. From that the next attempt knows which rows were in flight when
the process ended, and which rows the function was ever called on. What rows have cost in processes
(see ``suspects.py``) is carried from journal to journal.
"""

from __future__ import annotations

import abc
import errno
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dask_pcm.errors import OutputError
from dask_pcm.ledger.journal.record import Record, pack
from dask_pcm.ledger.suspects import Cost

#: Seconds after which appended records are synced: what the loss of a node can cost.
SYNC_S = 5.0
#: Errors of the kernel that mean that a filesystem, a quota or a file is full.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Journal(abc.ABC):
    """The journal of one attempt at a unit; written by one thread.

    Parameters
    ----------
    name
        Name of the journal in the output.
    about
        Which attempt this is (``run``, ``begun``, ``unit``), and the origin that a part made of it
        would note.
    """

    #: An open file to which ``faulthandler`` can write its tracebacks before it ends the process;
    #: None if there is none.
    descriptor: int | None = None

    def __init__(self, name: str, about: Mapping[str, Any]) -> None:
        self.name = name
        self._write(pack(about))

    def begin(self, start: int, stop: int, waits: bool = False) -> None:
        """Record that rows are begun: from now on they may be what ends the process.

        Unless they wait for a context first; see ``wait``.
        """
        rows = [start, stop]
        self._write(pack({"begin": rows, "wait": rows} if waits else {"begin": rows}))

    def wait(self, start: int, stop: int) -> None:
        """Record that rows wait for a context: while they do, they cannot end the process."""
        self._write(pack({"wait": [start, stop]}))

    def call(self, start: int, stop: int) -> None:
        """Record that the function is about to be called on rows."""
        self._write(pack({"call": [start, stop]}))

    def settle(self, earlier: Sequence[str], costs: Sequence[Cost]) -> None:
        """Record what rows have cost in all, with the process deaths in the journals `earlier`.

        Called before any row is computed. Otherwise, if this process died, the next attempt would
        charge the deaths in `earlier` once more.
        """
        self._write(pack({"costs": list(costs), "settled": list(earlier)}))

    def keep(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Add to the drafts of rows that are not finished: what they have more than before."""
        keys = pa.array(list(drafts), pa.int64())
        more = pa.array([[*draft] for draft in drafts.values()], pa.list_(pa.int64()))
        self._write(pack({"drafts": len(drafts)}, pa.table({"key": keys, "draft": more})))

    def append(self, record: Record) -> None:
        """Add finished rows."""
        head = {
            "rows": [record.start, record.stop],
            "failed": record.n_failed,
            "errors": list(record.errors),
            "facts": dict(record.facts),
        }
        self._write(pack(head, record.table))

    @abc.abstractmethod
    def _write(self, blocks: Sequence[bytes | memoryview]) -> None:
        """Write one record, so that it survives this process: all blocks or none."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the journal; what was written stays."""


class FileJournal(Journal):
    """A journal in a file.

    Parameters
    ----------
    descriptor
        A file that is open for appending; closed with the journal.
    name, about
        As for ``Journal``.
    """

    def __init__(self, descriptor: int, name: str, about: Mapping[str, Any]) -> None:
        self._descriptor = self.descriptor = descriptor
        self._synced_at = time.monotonic()
        try:
            super().__init__(name, about)
        except BaseException:
            self.close()
            raise

    def _write(self, blocks: Sequence[bytes | memoryview]) -> None:
        try:
            # One call per record: once it returns, the record is in the page cache, which outlives
            # a killed process. Separate writes could leave a head without its table.
            if os.writev(self._descriptor, blocks) < sum(map(len, blocks)):
                raise OSError(errno.ENOSPC, "a record could only be written in part")
            # Only the loss of a node needs a sync, and a sync per batch would cost more than
            # short batches take.
            if time.monotonic() - self._synced_at > SYNC_S:
                os.fdatasync(self._descriptor)
                self._synced_at = time.monotonic()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise OutputError(
                f"There is no room left for the journals of the output: {error}. Free some space,"
                " and rerun the same call to resume."
            ) from error

    def close(self) -> None:
        """Close the file; all records are in the page cache at least."""
        os.close(self._descriptor)


class ObjectJournal(Journal):
    """A journal as numbered objects, for stores in which nothing can be appended to an object.

    Parameters
    ----------
    put
        Puts an object under a name in the output.
    name, about
        As for ``Journal``.
    """

    def __init__(
        self, put: Callable[[str, bytes], None], name: str, about: Mapping[str, Any]
    ) -> None:
        self._put = put
        self._numbers = itertools.count()
        super().__init__(name, about)

    def _write(self, blocks: Sequence[bytes | memoryview]) -> None:
        # Numbers have nine digits, so that a listing has the records in the order of writing.
        self._put(f"{self.name}/{next(self._numbers):09d}", b"".join(blocks))

    def close(self) -> None:
        """Nothing to close: each record was put as a whole."""
