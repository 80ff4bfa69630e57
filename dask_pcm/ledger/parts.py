"""Parts of an output: their names, and how one is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.ledger.decode import is_count, parse

METADATA_KEY = b"dask_pcm"
_PART = re.compile(r"part-(\d{12,})-(\d{12,})\.parquet|part-p(\d{8,})\.parquet")


def range_name(start: int, stop: int) -> str:
    """Name of the part for rows `start` to `stop` of the input."""
    return f"part-{start:012d}-{stop:012d}.parquet"


def partition_name(partition: int) -> str:
    """Name of the part for a whole partition of a frame whose rows nobody has counted."""
    return f"part-p{partition:08d}.parquet"


def parse_name(name: str) -> tuple[int, int] | int | None:
    """The row range or the partition in a part's name; None for any other name.

    >>> parse_name(range_name(5, 9)), parse_name(partition_name(3)), parse_name(range_name(9, 5))
    ((5, 9), 3, None)
    """
    match = _PART.fullmatch(name)
    if match is None:
        return None
    start, stop, partition = match.groups()
    if partition:
        return int(partition)
    place = int(start), int(stop)
    return place if place[0] < place[1] or place == (0, 0) else None


#: Makes the note of a part when its rows are known; it has at least ``rows`` and ``failed``.
Note = Callable[[], Mapping[str, Any]]


def write_part(
    file: BinaryIO, name: str, tables: Iterable[pa.Table], note: Note
) -> tuple[int, dict[str, Any]]:
    """Write tables of one schema, a row group each, with a note in the file's metadata.

    Besides what it is given, the note has the part's name (``unit``), and the size and digest of
    all that stands before the footer (``data``): so a part tells by itself whether it is whole,
    and where it belongs.

    Returns the bytes of the file, and the note.
    """
    hashing = _Hashing(file)
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(pa.PythonFile(hashing, "w"), first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table.cast(first.schema))
        data = {"bytes": hashing.n_bytes, "digest": hashing.hash.hexdigest()}
        found = {**note(), "unit": name, "data": data}
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(found).encode()})
    return hashing.n_bytes, found


def is_intact(file: BinaryIO, note: Mapping[str, Any]) -> bool:
    """Whether a part's rows are the bytes that were written with its note."""
    if "data" not in note:  # an older version wrote it
        return True
    n_bytes, sha = note["data"]["bytes"], hashlib.blake2b(digest_size=16)
    while n_bytes and (block := file.read(min(n_bytes, 1 << 20))):
        sha.update(block)
        n_bytes -= len(block)
    return n_bytes == 0 and bool(sha.hexdigest() == note["data"]["digest"])


def note_of(metadata: pq.FileMetaData) -> dict[str, Any]:
    """The note in a part's metadata; empty if it has none.

    Raises
    ------
    ValueError
        Where the note is damaged, or is not of this file.
    """
    text = (metadata.metadata or {}).get(METADATA_KEY)
    if text is None:
        return {}
    note = parse(text)
    if not isinstance(note, dict) or not _is_sound(note):
        raise ValueError("its note is damaged")
    if metadata.num_rows != note["rows"]:
        raise ValueError(f"it has {metadata.num_rows:,} rows, and its note says {note['rows']:,}")
    return note


def _is_sound(note: Mapping[str, Any]) -> bool:
    data, retried = note.get("data", {"bytes": 0, "digest": ""}), note.get("retried", [])
    return (
        is_count(note.get("rows"))
        and is_count(note.get("failed"))
        and all(isinstance(note.get(key, ""), str) for key in ("unit", "run", "begun"))
        and isinstance(data, dict)
        and is_count(data.get("bytes"))
        and isinstance(data.get("digest"), str)
        and isinstance(retried, list)
        and all(isinstance(again, dict) for again in retried)
    )


class _Hashing:
    """What is written through it is counted and digested."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.n_bytes = 0
        self.hash = hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.hash.update(data)
        self.n_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.n_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.flush()
