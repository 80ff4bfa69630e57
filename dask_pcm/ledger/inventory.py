"""Inventory of an output: which rows are committed, by the parts and their notes.

The log saves reading parts. A part whose size and time match a line of the log is what was
committed under its name. Any other part is read as a whole and compared with its note, which says
where it belongs and has the digest of its data. So no line of the log is needed, and no line makes
a valid part of anything else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from dask_pcm.errors import OutputError
from dask_pcm.ledger.log_lines import parse_line
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import is_intact, parse_name, range_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.storage.base import Entry

logger = logging.getLogger(__name__)

#: Reads wait for the filesystem or the store, hence more threads than cores.
_N_READERS = 16


class Counts(NamedTuple):
    """Number of rows of a part, and of rows with an error."""

    n_rows: int
    n_failed: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Which parts the output of a job may have.

    Attributes
    ----------
    rows
        Rows of the input; None if they are not counted, and parts are whole partitions.
    n_partitions
        Number of partitions of the frame.
    keeps_rows
        Whether the output has one row for each row of the input.
    """

    rows: Ranges | None
    n_partitions: int
    keeps_rows: bool

    def fault(self, origin: Range | int, n_rows: int) -> str | None:
        """Why a part cannot be of this job, in words; None if it can.

        `origin` is its range of input rows or its partition, `n_rows` its number of rows.
        """
        if isinstance(origin, int):
            if self.rows is not None:
                return "is of a whole partition, but this output is cut by rows"
            is_inside = origin < self.n_partitions
            return None if is_inside else f"is beyond the {self.n_partitions:,} partitions"
        # The empty part, which every output has.
        if origin == (0, 0):
            return None
        if self.rows is None:
            return "is of a range of rows, but this output is cut by partitions"
        if any(self.rows.missing(*origin)):
            return f"is of rows that the input does not have ({self.rows.n_rows:,} rows in all)"
        n_expected = origin[1] - origin[0]
        if self.keeps_rows and n_rows != n_expected:
            return f"has {n_rows:,} rows, for {n_expected:,} rows of the input"
        return None


def take_inventory(output: Output, extent: Extent | None = None) -> dict[str, Counts]:
    """Count the rows of every part.

    In an object store, parts that a fenced run has put late are removed.

    Raises
    ------
    OutputError
        If a part was changed since it was committed, is a copy of another, was not written by
        dask_pcm, has rows in common with another, or cannot be of the job (`extent`).
    """
    # The log first: a part that is committed between the two reads has no line here, and is read.
    # The other way round, its line would make it look like a part that was removed.
    noted = _noted(output)
    parts = output.parts()
    _warn_of_removed(output, noted, parts)

    def count(item: tuple[str, Entry]) -> Counts | None:
        name, entry = item
        return _count(output, name, entry, noted.get(name, []))

    with ThreadPoolExecutor(_N_READERS) as pool:
        counts = zip(parts, pool.map(count, parts.items()), strict=True)
        found = {name: rows for name, rows in counts if rows is not None}
    for name, (n_rows, _) in found.items() if extent is not None else ():
        origin = parse_name(name)
        if extent and origin is not None and (fault := extent.fault(origin, n_rows)):
            raise _removable(output, name, fault)
    for name in _remove_overlapping(output, list(found)):
        del found[name]
    return found


def _noted(output: Output) -> dict[str, list[Mapping[str, Any]]]:
    """Lines of the log about parts, by name of the part.

    A part has several lines if several attempts committed it, or if it was replaced. Each counts:
    which of them was last cannot be known, as each process has a log file of its own.
    """
    noted: dict[str, list[Mapping[str, Any]]] = {}
    n_damaged = 0
    for text in filter(None, output.storage.log.texts()):
        line = parse_line(text)
        n_damaged += line is None
        if line is not None and "commit" in line and output.is_current(line):
            noted.setdefault(line["commit"], []).append(line)
    if n_damaged:
        logger.warning(
            "%s damaged lines in the log of %s are skipped: the parts that they noted are read.",
            f"{n_damaged:,}",
            output.path,
        )
    return noted


def _warn_of_removed(output: Output, noted: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    origins = (parse_name(name) for name in parts)
    committed = Ranges(rows for rows in origins if isinstance(rows, tuple))
    removed = []
    for name in noted.keys() - parts.keys():
        origin = parse_name(name)
        # The line comes before the part. So an attempt that was killed in between leaves a line
        # without a part; if a later attempt committed its rows in other units, none is missing.
        if any(committed.missing(*origin)) if isinstance(origin, tuple) else True:
            removed.append(name)
    if removed:
        logger.warning(
            "%s parts of %s that were committed are gone, such as %s: their rows are computed"
            " again.",
            f"{len(removed):,}",
            output.path,
            min(removed),
        )


def _remove_overlapping(output: Output, names: list[str]) -> Iterator[str]:
    """Remove parts that have rows in common with wider ones, and yield their names.

    They can only appear in object stores, late from a fenced run; elsewhere they are an error.
    """
    origins = [rows for name in names if isinstance(rows := parse_name(name), tuple)]
    widest = (0, 0)
    for rows in sorted(rows for rows in origins if rows[0] < rows[1]):
        if rows[0] >= widest[1]:
            widest = rows
            continue
        # The wider one stays: fewer rows are lost.
        narrow, wide = sorted((rows, widest), key=lambda pair: pair[1] - pair[0])
        name, other = range_name(*narrow), range_name(*wide)
        if not output.storage.allows_late_commits:
            raise OutputError(
                f"The parts {name!r} and {other!r} in {output.path!r} have rows in common. Remove"
                " one of them; missing rows are then computed again."
            )
        logger.warning("Removing %s, which has rows in common with %s", name, other)
        output.storage.remove(name)
        widest = wide
        yield name


def is_first(name: str) -> bool:
    """Whether a part is the empty one, committed first so that the output can be read at once."""
    return name == range_name(0, 0)


def _count(
    output: Output, name: str, entry: Entry, noted: list[Mapping[str, Any]]
) -> Counts | None:
    for line in noted:
        # Lines that were written before the part in an object store have no stamp.
        if entry.stamp and (line["bytes"], line["stamp"]) == (entry.n_bytes, entry.stamp):
            return Counts(line["rows"], line["failed"])
    note = output.read_note(name)
    if not note and noted:
        raise _removable(output, name, "was changed since it was committed")
    if not note:
        raise OutputError(f"{name!r} in {output.path!r} was not written by dask_pcm. Move it away.")
    if not output.is_current(note):
        if not output.storage.allows_late_commits:
            raise OutputError(f"{name!r} in {output.path!r} is of another output. Move it away.")
        logger.warning("Removing %s: a fenced run put it late", name)
        output.storage.remove(name)
        return None
    if note.get("unit") != name:
        was = note.get("unit")
        # Copies would give rows twice, and hide rows that are missing.
        raise _removable(output, name, f"was committed as {was!r}: it is a copy, or was renamed")
    with output.storage.reader(name) as file:
        if not is_intact(file, note):
            raise _removable(output, name, "was changed since it was committed")
    return Counts(note["rows"], note["failed"])


def _removable(output: Output, name: str, fault: str) -> OutputError:
    return OutputError(
        f"The part {name!r} in {output.path!r} {fault}. Remove it; missing rows are then computed"
        " again. Or give another folder."
    )
