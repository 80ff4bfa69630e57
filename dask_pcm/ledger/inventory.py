"""What an output has: its parts, each by its own note.

The log saves reading them: a part whose size and time are as they were noted is what was committed
under its name. Any other is read through and held against its note, which says where it belongs and
what its bytes are. So no line of the log has to be there, and none makes a part of what is none.
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

_N_READERS = 16


class Counts(NamedTuple):
    """Rows of a part, and those with an error."""

    n_rows: int
    n_failed: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Which parts the whole output of a job may have.

    Attributes
    ----------
    rows
        Rows of the input; None where nobody has counted them, and parts are whole partitions.
    n_partitions
        Partitions of the frame.
    keeps_rows
        Whether there is a row of output for each row of input.
    """

    rows: Ranges | None
    n_partitions: int
    keeps_rows: bool

    def fault(self, place: Range | int, n_rows: int) -> str | None:
        """What is wrong with so many rows of output in this place; None if nothing is."""
        if isinstance(place, int):
            if self.rows is not None:
                return "is of a whole partition, and this output is cut by rows"
            is_inside = place < self.n_partitions
            return None if is_inside else f"lies beyond the {self.n_partitions:,} partitions"
        if place == (0, 0):
            return None
        if self.rows is None:
            return "is of a range of rows, and this output is cut by partitions"
        if any(self.rows.missing(*place)):
            return f"is of rows that the input does not have ({self.rows.n_rows:,} rows in all)"
        n_expected = place[1] - place[0]
        if self.keeps_rows and n_rows != n_expected:
            return f"has {n_rows:,} rows, for {n_expected:,} rows of the input"
        return None


def take_inventory(output: Output, extent: Extent | None = None) -> dict[str, Counts]:
    """Count the rows of every part.

    In an object store, parts that arrived from a run that was shut out are removed.

    Raises
    ------
    OutputError
        Where a part was changed since it was committed, is a copy of another, was not written by
        us, has rows that others have as well, or is none of the job's (`extent`).
    """
    noted = _noted(output)
    parts = output.parts()
    _tell_of_gone(output, noted, parts)

    def count(item: tuple[str, Entry]) -> Counts | None:
        name, entry = item
        return _count(output, name, entry, noted.get(name, []))

    with ThreadPoolExecutor(_N_READERS) as pool:
        counts = zip(parts, pool.map(count, parts.items()), strict=True)
        found = {name: rows for name, rows in counts if rows is not None}
    for name, (n_rows, _) in found.items() if extent is not None else ():
        place = parse_name(name)
        if extent and place is not None and (fault := extent.fault(place, n_rows)):
            raise _removable(output, name, fault)
    for name in _overlapping(output, list(found)):
        del found[name]
    return found


def _noted(output: Output) -> dict[str, list[Mapping[str, Any]]]:
    """Lines of the log that tell of parts, by their names."""
    noted: dict[str, list[Mapping[str, Any]]] = {}
    n_damaged = 0
    for text in filter(None, output.storage.log.texts()):
        line = parse_line(text)
        n_damaged += line is None
        if line is not None and "commit" in line and output.is_current(line):
            noted.setdefault(line["commit"], []).append(line)
    if n_damaged:
        logger.warning(
            "%s damaged lines in the log of %s are left out: parts that they told of are read.",
            f"{n_damaged:,}",
            output.path,
        )
    return noted


def _tell_of_gone(output: Output, noted: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    places = (parse_name(name) for name in parts)
    there = Ranges(place for place in places if isinstance(place, tuple))
    gone = []
    for name in noted.keys() - parts.keys():
        place = parse_name(name)
        if any(there.missing(*place)) if isinstance(place, tuple) else True:
            gone.append(name)
    if gone:
        logger.warning(
            "%s parts of %s that were committed are gone, such as %s: their rows are computed"
            " again.",
            f"{len(gone):,}",
            output.path,
            min(gone),
        )


def _overlapping(output: Output, names: list[str]) -> Iterator[str]:
    """Parts whose rows others have as well; they are removed, where such a thing may come about."""
    places = [place for name in names if isinstance(place := parse_name(name), tuple)]
    widest = (0, 0)
    for place in sorted(place for place in places if place[0] < place[1]):
        if place[0] >= widest[1]:
            widest = place
            continue
        narrow, wide = sorted((place, widest), key=lambda pair: pair[1] - pair[0])
        name, other = range_name(*narrow), range_name(*wide)
        if not output.storage.allows_late_commits:
            raise OutputError(
                f"The parts {name!r} and {other!r} in {output.path!r} have rows in common. Remove"
                " one of them; what is missing then is computed again."
            )
        logger.warning("Removing %s, which has rows in common with %s", name, other)
        output.storage.remove(name)
        widest = wide
        yield name


def is_first(name: str) -> bool:
    """Whether a part is the empty one, which makes an output readable from the beginning."""
    return name == range_name(0, 0)


def _count(
    output: Output, name: str, entry: Entry, noted: list[Mapping[str, Any]]
) -> Counts | None:
    for line in noted:
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
        logger.warning("Removing %s: it arrived from a run that was shut out", name)
        output.storage.remove(name)
        return None
    if note.get("unit") != name:
        was = note.get("unit")
        raise _removable(output, name, f"was committed as {was!r}: it is a copy, or was renamed")
    with output.storage.reader(name) as file:
        if not is_intact(file, note):
            raise _removable(output, name, "was changed since it was committed")
    return Counts(note["rows"], note["failed"])


def _removable(output: Output, name: str, fault: str) -> OutputError:
    return OutputError(
        f"The part {name!r} in {output.path!r} {fault}. Remove it, and what is missing then is"
        " computed again; or give another folder."
    )
