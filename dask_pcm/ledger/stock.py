"""What an output has: its parts, held against what the ledger noted when they were committed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dask_pcm.errors import OutputError
from dask_pcm.ledger.output import Entry, Output
from dask_pcm.ledger.parts import parse_name, range_name

logger = logging.getLogger(__name__)

_N_READERS = 16


class Counts(NamedTuple):
    """Rows of a part, and those with an error."""

    n_rows: int
    n_failed: int


def take_stock(output: Output) -> dict[str, Counts]:
    """Count the rows of every part.

    A part whose size and time are as they were noted is taken at its word, one of another time is
    read through, and one that nobody noted (its worker was killed right after it committed) has
    its own note.

    In an object store, parts that arrived from a run that was shut out are removed.

    Raises
    ------
    OutputError
        Where a part was changed since it was committed, or was not written by us.
    """
    noted: dict[str, list[Mapping[str, Any]]] = {}
    for line in output.lines():
        if "commit" in line and output.has_begun(line):
            noted.setdefault(line["commit"], []).append(line)
    parts = output.parts()
    missing = [name for name in noted if name not in parts and parse_name(name) != (0, 0)]
    if missing:
        logger.warning(
            "%s parts of %s that were committed are gone, such as %s: their rows are computed"
            " again.",
            f"{len(missing):,}",
            output.path,
            sorted(missing)[0],
        )

    def count(item: tuple[str, Entry]) -> Counts | None:
        name, entry = item
        return _count(output, name, entry, noted.get(name, []))

    with ThreadPoolExecutor(_N_READERS) as pool:
        counts = zip(parts, pool.map(count, parts.items()), strict=True)
        found = {name: rows for name, rows in counts if rows is not None}
    for name in _overlapping(output, list(found)):
        del found[name]
    return found


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
        if not output.may_get_late_parts:
            raise OutputError(
                f"The parts {name!r} and {other!r} in {output.path!r} have rows in common. Remove"
                " one of them; what is missing then is computed again."
            )
        logger.warning("Removing %s, which has rows in common with %s", name, other)
        output.remove(name)
        widest = wide
        yield name


def is_first(name: str) -> bool:
    """Whether a part is the empty one, which makes an output readable from the beginning."""
    return name == range_name(0, 0)


def _count(
    output: Output, name: str, entry: Entry, noted: list[Mapping[str, Any]]
) -> Counts | None:
    for line in noted:
        if (line["bytes"], line["stamp"]) == (entry.n_bytes, entry.stamp):
            return Counts(line["rows"], line["failed"])
    if noted:
        digest = output.digest(name)
        for line in noted:
            if line["digest"] == digest:  # a copy of the output: the same bytes at another time
                return Counts(line["rows"], line["failed"])
        if _is_late(output, name):
            return None
        raise OutputError(
            f"The part {name!r} in {output.path!r} was changed since it was committed"
            f" ({noted[-1]['bytes']:,} bytes then, {entry.n_bytes:,} now). Remove it, and its rows"
            " are computed again; or give another folder."
        )
    try:
        note = output.read_note(name)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"The part {name!r} in {output.path!r} cannot be read ({error}). Remove it, and its"
            " rows are computed again."
        ) from error
    if "rows" not in note:
        raise OutputError(f"{name!r} in {output.path!r} was not written by dask_pcm. Move it away.")
    if _is_late(output, name):
        return None
    if not output.has_begun(note):
        raise OutputError(f"{name!r} in {output.path!r} is of another output. Move it away.")
    return Counts(note["rows"], note["failed"])


def _is_late(output: Output, name: str) -> bool:
    """Whether a part has arrived from a run that was shut out; it is removed then."""
    if not output.may_get_late_parts:
        return False
    with contextlib.suppress(OSError, ValueError):
        if not output.has_begun(output.read_note(name)):
            logger.warning("Removing %s: it arrived from a run that was shut out", name)
            output.remove(name)
            return True
    return False
