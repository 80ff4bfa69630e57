"""Parts of an output: how they are named, written and verified.

Each part has a note in its Parquet metadata: its name, the output's generation, counts of rows, and
the digest of its data. So a part proves by itself what it is, and whether it is complete.
"""

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
# Fixed widths, so that names sort by rows as text; larger numbers still parse.
_PART = re.compile(r"part-(\d{12,})-(\d{12,})\.parquet|part-p(\d{8,})\.parquet")


def range_name(start: int, stop: int) -> str:
    """Name of the part for the rows `start` to `stop` of the input."""
    return f"part-{start:012d}-{stop:012d}.parquet"


def partition_name(partition: int) -> str:
    """Name of the part for a whole partition, for frames whose rows are not counted."""
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
    rows = int(start), int(stop)
    # The empty part of rows 0 to 0 holds the schema; see `inventory.is_first`.
    return rows if rows[0] < rows[1] or rows == (0, 0) else None


#: Makes the note of a part, with at least ``rows`` and ``failed``. Called after the tables are
#: written, as they may be a generator that computes the rows.
Note = Callable[[], Mapping[str, Any]]


def write_part(
    file: BinaryIO, name: str, tables: Iterable[pa.Table], note: Note
) -> tuple[int, dict[str, Any]]:
    """Write tables of one schema, a row group each, and a note in the file's metadata.

    To the note are added the part's name (``unit``), and the size and digest of all bytes before
    the footer (``data``).

    Returns the size of the file in bytes, and the note.
    """
    # Digested while it is written: reading the file again would double the I/O.
    hashing = _Hashing(file)
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(pa.PythonFile(hashing, "w"), first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            # A file has one schema, that of its first table.
            writer.write_table(table.cast(first.schema))
        # The note is in the footer, so the digest can cover only what is before it.
        data = {"bytes": hashing.n_bytes, "digest": hashing.hash.hexdigest()}
        found = {**note(), "unit": name, "data": data}
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(found).encode()})
    return hashing.n_bytes, found


def is_intact(file: BinaryIO, note: Mapping[str, Any]) -> bool:
    """Whether the data of a part are the bytes that were written with its note."""
    if "data" not in note:
        # Written by a version before digests.
        return True
    n_bytes, blake = note["data"]["bytes"], hashlib.blake2b(digest_size=16)
    while n_bytes and (block := file.read(min(n_bytes, 1 << 20))):
        blake.update(block)
        n_bytes -= len(block)
    return n_bytes == 0 and bool(blake.hexdigest() == note["data"]["digest"])


def note_of(metadata: pq.FileMetaData) -> dict[str, Any]:
    """The note in a part's metadata; empty if it has none.

    Raises
    ------
    ValueError
        If the note is damaged, or is of another file.
    """
    text = (metadata.metadata or {}).get(METADATA_KEY)
    if text is None:
        return {}
    note = parse(text)
    if not isinstance(note, dict) or not _is_sound(note):
        raise ValueError("its note is damaged")
    if metadata.num_rows != note["rows"]:
        raise ValueError(f"it has {metadata.num_rows:,} rows, but its note says {note['rows']:,}")
    return note


def _is_sound(note: Mapping[str, Any]) -> bool:
    # Keys that versions have added are optional.
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
    """A file for writing that counts and digests what is written.

    It has what ``pyarrow.PythonFile`` uses of a file.
    """

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.n_bytes = 0
        # BLAKE2b is part of the format: `is_intact` must accept the parts of earlier versions.
        self.hash = hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        """Write a buffer."""
        self._file.write(data)
        self.hash.update(data)
        self.n_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Number of bytes written."""
        return self.n_bytes

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def close(self) -> None:
        """Flush the file and leave it open: its owner still has to sync it."""
        self.flush()
