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

It also says how far the rows at hand are: begun, waiting for a context, given to the function. So
it tells which rows were in flight when a process ended, and which the function has ever seen. What
rows have cost in processes (see ``suspects.py``) is carried from journal to journal.
"""

from __future__ import annotations

import abc
import errno
import hashlib
import itertools
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from dask_pcm.errors import OutputError
from dask_pcm.ledger.decode import are_ranges, are_texts, is_count, parse
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.suspects import Cost

#: Seconds after which what was appended is synced.
SYNC_S = 5.0
#: What the kernel says where nothing more can be written.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LENGTHS = struct.Struct("<QQ16s")
#: Keys of heads whose values are a range of rows.
_RANGES = ("rows", "begin", "wait", "call")


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
    name
        Of the journal, in the output.
    about
        Which attempt this is (``run``, ``begun``, ``unit``), and what a part of it would tell.
    """

    #: An open file that takes the last words of this process; None where there is none.
    descriptor: int | None = None

    def __init__(self, name: str, about: Mapping[str, Any]) -> None:
        self.name = name
        self._append(about)

    def begin(self, start: int, stop: int) -> None:
        """Say which rows are begun: what ends the process from now on may be their doing."""
        self._append({"begin": [start, stop]})

    def wait(self, start: int, stop: int) -> None:
        """Say that these rows wait for a context: what ends the process now is not their doing."""
        self._append({"wait": [start, stop]})

    def call(self, start: int, stop: int) -> None:
        """Say which rows the function is about to be called on."""
        self._append({"call": [start, stop]})

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
    name, about
        As of a ``Journal``.
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
            if os.writev(self._descriptor, blocks) < sum(map(len, blocks)):
                raise OSError(errno.ENOSPC, "a record could only be written in part")
            if time.monotonic() - self._synced_at > SYNC_S:
                os.fdatasync(self._descriptor)
                self._synced_at = time.monotonic()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise OutputError(
                f"There is no room left for the journals of the output: {error}. Make room, and run"
                " the same again to go on."
            ) from error

    def close(self) -> None:
        os.close(self._descriptor)


class ObjectJournal(Journal):
    """A journal as numbered objects, where nothing can be appended to one.

    Parameters
    ----------
    put
        Puts an object under a name in the output.
    name, about
        As of a ``Journal``.
    """

    def __init__(
        self, put: Callable[[str, bytes], None], name: str, about: Mapping[str, Any]
    ) -> None:
        self._put = put
        self._numbers = itertools.count()
        super().__init__(name, about)

    def _write(self, blocks: Sequence[bytes | memoryview]) -> None:
        self._put(f"{self.name}/{next(self._numbers):09d}", b"".join(blocks))

    def close(self) -> None:
        """All of it is there."""


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
    waiting
        Those among them that last waited for a context.
    called
        Rows that the function was called on.
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
    waiting: set[Range]
    called: list[Range]
    costs: list[Cost]
    settled: list[str]
    last_words: str = ""

    @property
    def in_flight(self) -> list[Range]:
        """Rows that it had begun and not finished, and that did not wait for a context."""
        done = Ranges((record.start, record.stop) for record in self.records)
        begun = (rows for rows in self.begun if rows not in self.waiting)
        return [rows for rows in begun if any(done.missing(*rows))]

    def is_named(self, name: str) -> bool:
        """Whether this is what a journal of this name tells of: its unit, and rows of that."""
        unit = self.about.get("unit")
        if not isinstance(unit, str) or not isinstance(self.about.get("run"), str):
            return False
        place = parse_name(unit)
        start, stop = place if isinstance(place, tuple) else (0, 0)
        told = [*((record.start, record.stop) for record in self.records), *self.begun]
        return name.startswith(f"{unit}.") and all(start <= a and b <= stop for a, b in told)


def read_journal(data: bytes) -> Found | None:
    """What a journal holds, up to where it was torn; None where not even its beginning is whole."""
    heads = _heads(data)
    first = next(heads, None)
    if first is None:
        return None
    found, end = Found(first[0], [], [], set(), [], [], []), first[2]
    for head, content, after in heads:
        if not _take_in(found, head, content):
            break
        end = after
    rest = data[end:]
    return found._replace(last_words=rest.decode("utf-8", "replace")) if is_late(rest) else found


def _take_in(found: Found, head: Mapping[str, Any], content: memoryview) -> bool:
    """Whether a record is one of ours."""
    if "costs" in head:
        found.costs.extend(Cost(*cost) for cost in head["costs"])
        found.settled.extend(head.get("settled", []))
    elif "begin" in head:
        found.begun.append(tuple(head["begin"]))
    elif "wait" in head:
        found.waiting.add(tuple(head["wait"]))
    elif "call" in head:
        start, stop = head["call"]
        found.called.append((start, stop))
        found.waiting.difference_update([r for r in found.waiting if r[0] <= start < r[1]])
    elif (record := _to_record(head, content)) is not None:
        found.records.append(record)
    else:
        return False
    return True


def _parse_head(text: bytes) -> dict[str, Any] | None:
    """A head with all that is looked for in it; None for one that is none of ours."""
    try:
        head = parse(text)
    except ValueError:
        return None
    if not isinstance(head, dict):
        return None
    costs, errors, facts = head.get("costs", []), head.get("errors", []), head.get("facts", {})
    is_sound = (
        all(are_ranges([head[key]]) for key in _RANGES if key in head)
        and isinstance(costs, list)
        and all(isinstance(cost, list) and len(cost) in (3, 4) for cost in costs)
        and are_ranges([cost[:2] for cost in costs])
        and all(is_count(count) for cost in costs for count in cost[2:])
        and are_texts(head.get("settled", []))
        and is_count(head.get("failed", 0))
        and are_texts(errors)
        and isinstance(facts, dict)
        and are_texts(list(facts.values()))
    )
    return head if is_sound else None


def _to_record(head: Mapping[str, Any], content: memoryview) -> Record | None:
    if "rows" not in head:
        return None
    start, stop = head["rows"]
    try:
        table = pa.ipc.open_stream(content).read_all()
        table.validate()
    except (pa.ArrowException, OSError):
        return None
    says = head.get("failed", 0), head.get("errors", []), head.get("facts", {})
    fits = 0 < stop - start >= len(table)
    return Record(start, stop, table, *says, is_kept=True) if fits else None


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
        head = _parse_head(bytes(about))
        if head is None:
            return
        at += n_about + n_content
        yield head, content, at


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
