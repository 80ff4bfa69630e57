"""Finished rows of unfinished units.

While a unit is computed, each finished batch is appended to a file of the unit's own, one record
with one ``write(2)``: from then on it is in the kernel's hands, and a killed process loses no more
than the batch that it was at. Every few seconds the file is synced, which bounds what a lost node
costs. Whoever computes the unit next takes over what the journals of earlier attempts hold, and a
later run commits it.

``OUTPUT/_pcm/journal/<name of the part>.<run>.<attempt>`` holds records: their lengths and their
digest, a head in JSON, and a table as an Arrow IPC stream. What a lost node has torn, and all that
comes after it, counts as not written. If a call took too long, the last words of its process
follow: where its threads were when it was ended.

It says which rows are begun as well, and so which were in hand when a process ended. What rows have
cost in processes (see ``suspects.py``) is carried from journal to journal.
"""

from __future__ import annotations

import abc
import errno
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.suspects import Cost

#: Seconds after which what was appended is synced.
SYNC_S = 5.0
_LENGTHS = struct.Struct("<QQ16s")


@dataclass(frozen=True, slots=True)
class Record:
    """Rows of the input that have been computed, and what became of them.

    Attributes
    ----------
    start, stop
        Which rows, counted over the whole input.
    table
        Their answers; with filters there are fewer.
    n_failed, errors
        Answers with an error, and some of the errors.
    facts
        Where and how the contexts ran: device, dtype.
    is_kept
        Whether an earlier attempt computed them.
    """

    start: int
    stop: int
    table: pa.Table
    n_failed: int = 0
    errors: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    is_kept: bool = False


class Journal(abc.ABC):
    """The journal of one attempt at a unit; written by one thread.

    Parameters
    ----------
    about
        Which attempt this is (``run``, ``begun``, ``unit``), and what a part of it would tell.
    """

    #: An open file that takes the last words of this process; None where there is none.
    descriptor: int | None = None

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._append(about)

    def begin(self, start: int, stop: int) -> None:
        """Say which rows are begun, so that nobody takes others for begun."""
        self._append({"begin": [start, stop]})

    def settle(self, earlier: Sequence[str], costs: Sequence[Cost]) -> None:
        """Say what rows have cost in all: whatever the journals `earlier` tell has been counted."""
        self._append({"costs": list(costs), "settled": list(earlier)})

    def append(self, record: Record) -> None:
        """Add what is finished."""
        head = {
            "rows": [record.start, record.stop],
            "failed": record.n_failed,
            "errors": list(record.errors),
            "facts": dict(record.facts),
        }
        self._append(head, _to_buffer(record.table))

    def _append(self, head: Mapping[str, Any], content: bytes | pa.Buffer = b"") -> None:
        about, table = json.dumps(head).encode(), memoryview(content)
        lengths = _LENGTHS.pack(len(about), len(table), _digest(about, table))
        self._write([lengths, about, table])

    @abc.abstractmethod
    def _write(self, blocks: Sequence[bytes | memoryview]) -> None:
        """Have blocks survive this process, all of them or none."""

    @abc.abstractmethod
    def close(self) -> None: ...


class FileJournal(Journal):
    """A journal in a file.

    Parameters
    ----------
    descriptor
        A file that is open for appending; closed with this.
    about
        As of a ``Journal``.
    """

    def __init__(self, descriptor: int, about: Mapping[str, Any]) -> None:
        self._descriptor = self.descriptor = descriptor
        self._synced_at = time.monotonic()
        try:
            super().__init__(about)
        except BaseException:
            self.close()
            raise

    def _write(self, blocks: Sequence[bytes | memoryview]) -> None:
        n_written = os.writev(self._descriptor, blocks)
        if n_written < sum(map(len, blocks)):
            raise OSError(errno.ENOSPC, "a record could only be written in part")
        if time.monotonic() - self._synced_at > SYNC_S:
            os.fdatasync(self._descriptor)
            self._synced_at = time.monotonic()

    def close(self) -> None:
        os.close(self._descriptor)


class Found(NamedTuple):
    """What the journal of an earlier attempt holds.

    Attributes
    ----------
    about
        Which attempt that was (``run``, ``begun``, ``unit``), and what a part of it would tell.
    records
        What it had finished.
    begun
        Rows that it had begun.
    costs
        Rows that had cost processes before.
    settled
        Names of journals that it had taken over: whether their last batch was to blame for the end
        of their process has been asked.
    last_words
        Where the threads of its process were when a call took too long; else empty.
    """

    about: Mapping[str, Any]
    records: list[Record]
    begun: list[Range]
    costs: list[Cost]
    settled: list[str]
    last_words: str = ""

    @property
    def in_hand(self) -> list[Range]:
        """Rows that it had begun and not finished."""
        finished = Ranges((record.start, record.stop) for record in self.records)
        return [rows for rows in self.begun if any(finished.missing(*rows))]


def read_journal(data: bytes) -> Found | None:
    """What a journal holds, up to where it was torn; None where not even its beginning is whole."""
    heads = _heads(data)
    first = next(heads, None)
    if first is None:
        return None
    found, end = Found(first[0], [], [], [], []), first[2]
    for head, content, end in heads:  # noqa: B007
        if "costs" in head:
            found.costs.extend(Cost(*cost) for cost in head["costs"])
            found.settled.extend(head["settled"])
            continue
        if "begin" in head:
            found.begun.append(tuple(head["begin"]))
            continue
        table = pa.ipc.open_stream(content).read_all()
        start, stop = head["rows"]
        says = head["failed"], head["errors"], head["facts"]
        found.records.append(Record(start, stop, table, *says, is_kept=True))
    rest = data[end:]
    return found._replace(last_words=rest.decode("utf-8", "replace")) if is_late(rest) else found


def is_late(rest: bytes) -> bool:
    """Whether what follows the last whole record are last words, as ``faulthandler`` has them."""
    return rest.startswith(b"Timeout (")


def _heads(data: bytes) -> Iterator[tuple[dict[str, Any], memoryview, int]]:
    """Heads and tables of records, and where each ends."""
    view, at = memoryview(data), 0
    while at + _LENGTHS.size <= len(view):
        n_about, n_content, digest = _LENGTHS.unpack_from(view, at)
        at += _LENGTHS.size
        if n_about + n_content > len(view) - at:
            return
        about, content = view[at : at + n_about], view[at + n_about : at + n_about + n_content]
        if _digest(about, content) != digest:
            return
        at += n_about + n_content
        yield json.loads(bytes(about)), content, at


def apart(records: Sequence[Record]) -> list[Record]:
    """Records in the order of their rows; of those with rows in common, one."""
    chosen: list[Record] = []
    for record in sorted(records, key=lambda record: (record.start, record.stop)):
        if not chosen or record.start >= chosen[-1].stop:
            chosen.append(record)
    return chosen


def _to_buffer(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _digest(*blocks: bytes | memoryview) -> bytes:
    sha = hashlib.blake2b(digest_size=16)
    for block in blocks:
        sha.update(block)
    return sha.digest()
