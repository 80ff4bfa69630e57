"""Reading the journal of an earlier attempt, up to its torn end.

A record that is torn or damaged counts as not written, and so does all that follows it. If a call
exceeded ``batch_timeout``, the journal ends with the tracebacks that ``faulthandler`` wrote when it
ended the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from dask_pcm.ledger.journal.record import Record, unpack
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.suspects import Cost


class Found(NamedTuple):
    """Content of the journal of an earlier attempt.

    Attributes
    ----------
    about
        Which attempt it was (``run``, ``begun``, ``unit``), and the origin that a part made of it
        would note.
    records
        Finished rows.
    begun
        Rows that were begun.
    waiting
        Those of them that last waited for a context.
    called
        Rows that the function was called on.
    costs
        What rows had cost in processes before.
    drafts
        What rows that were not finished had so far, by key.
    settled
        Names of the journals that it had taken over. The deaths of their processes are charged
        already.
    last_words
        Tracebacks of the process if a call exceeded ``batch_timeout``; else empty.
    """

    about: Mapping[str, Any]
    records: list[Record]
    begun: list[Range]
    waiting: set[Range]
    called: list[Range]
    costs: list[Cost]
    settled: list[str]
    drafts: dict[int, list[int]]
    last_words: str = ""

    @property
    def in_flight(self) -> list[Range]:
        """Rows that were begun and not finished, and that did not wait for a context."""
        done = Ranges((record.start, record.stop) for record in self.records)
        begun = (rows for rows in self.begun if rows not in self.waiting)
        return [rows for rows in begun if any(done.missing(*rows))]

    def is_named(self, name: str) -> bool:
        """Whether a journal of this name may have this content: its unit, and rows of the unit."""
        unit = self.about.get("unit")
        if not isinstance(unit, str) or not isinstance(self.about.get("run"), str):
            return False
        rows = parse_name(unit)
        # Partitions have no row numbers, so a journal of one may not have any rows.
        start, stop = rows if isinstance(rows, tuple) else (0, 0)
        told = [*((record.start, record.stop) for record in self.records), *self.begun]
        return name.startswith(f"{unit}.") and all(start <= a and b <= stop for a, b in told)


def read_journal(data: bytes) -> Found | None:
    """Decode a journal up to where it was torn; None if even its first record is incomplete."""
    heads = unpack(data)
    first = next(heads, None)
    if first is None:
        return None
    found, end = Found(first[0], [], [], set(), [], [], [], {}), first[2]
    for head, content, after in heads:
        if not _add(found, head, content):
            break
        end = after
    # Searched for only after the last whole record: a user's rows may hold any text.
    rest = data[end:]
    if not is_traceback(rest):
        return found
    return found._replace(last_words=rest.decode("utf-8", "replace"))


def _add(found: Found, head: Mapping[str, Any], content: memoryview) -> bool:
    """Add a record to what was found; False if it is of no known kind."""
    if "costs" in head:
        found.costs.extend(Cost(*cost) for cost in head["costs"])
        found.settled.extend(head.get("settled", []))
    elif "begin" in head or "wait" in head:
        if "begin" in head:
            found.begun.append(tuple(head["begin"]))
        if "wait" in head:
            found.waiting.add(tuple(head["wait"]))
    elif "call" in head:
        start, stop = head["call"]
        found.called.append((start, stop))
        # The context has arrived. A batch may be called in pieces, so any piece ends the waiting.
        found.waiting.difference_update([r for r in found.waiting if r[0] <= start < r[1]])
    elif "drafts" in head:
        return _add_drafts(found.drafts, content)
    elif (record := _to_record(head, content)) is not None:
        found.records.append(record)
    else:
        return False
    return True


def _add_drafts(drafts: dict[int, list[int]], content: memoryview) -> bool:
    try:
        table = _read_table(content)
        for key, more in zip(table["key"].to_pylist(), table["draft"].to_pylist(), strict=True):
            drafts.setdefault(int(key), []).extend(map(int, more))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return False
    return True


def _to_record(head: Mapping[str, Any], content: memoryview) -> Record | None:
    if "rows" not in head:
        return None
    start, stop = head["rows"]
    try:
        table = _read_table(content)
    except (pa.ArrowException, OSError):
        return None
    outcome = head.get("failed", 0), head.get("errors", []), head.get("facts", {})
    fits = 0 < stop - start >= len(table)
    return Record(start, stop, table, *outcome, is_kept=True) if fits else None


def _read_table(content: memoryview) -> pa.Table:
    table = pa.ipc.open_stream(content).read_all()
    # Arrow trusts offsets in its buffers; a table from a file that others can write is checked.
    table.validate()
    return table


def is_traceback(rest: bytes) -> bool:
    """Whether the bytes after the last whole record are tracebacks of ``faulthandler``."""
    return rest.startswith(b"Timeout (")


def apart(records: Sequence[Record]) -> list[Record]:
    """Records sorted by row, without overlaps: of two with rows in common, the first is kept."""
    chosen: list[Record] = []
    for record in sorted(records, key=lambda record: (record.start, record.stop)):
        if not chosen or record.start >= chosen[-1].stop:
            chosen.append(record)
    return chosen
