"""Parts of an output: their names, and how one is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

METADATA_KEY = b"dask_pcm"
_PART = re.compile(r"part-(\d{12,})-(\d{12,})\.parquet|part-p(\d{8,})\.parquet")


def range_name(start: int, stop: int) -> str:
    """Name of the part for rows `start` to `stop` of the input."""
    return f"part-{start:012d}-{stop:012d}.parquet"


def partition_name(partition: int) -> str:
    """Name of the part for a whole partition of a frame whose rows nobody has counted."""
    return f"part-p{partition:08d}.parquet"


def parse_name(name: str) -> tuple[int, int] | int | None:
    """The row range or the partition in a part's name; None for any other name."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    start, stop, partition = match.groups()
    return int(partition) if partition else (int(start), int(stop))


class Written(NamedTuple):
    """A file as it was written."""

    n_bytes: int
    digest: str


#: Makes the note of a part when its rows are known; it has at least ``rows`` and ``failed``.
Note = Callable[[], Mapping[str, Any]]


def write_part(
    file: BinaryIO, tables: Iterable[pa.Table], note: Note
) -> tuple[Written, Mapping[str, Any]]:
    """Write tables of one schema, a row group each, with a note in the file's metadata.

    Returns how the file was written, and the note.
    """
    hashing = _Hashing(file)
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(pa.PythonFile(hashing, "w"), first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table.cast(first.schema))
        found = note()
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(found).encode()})
    return Written(hashing.n_bytes, hashing.hash.hexdigest()), found


def commit_line(
    run: str, name: str, written: Written, note: Mapping[str, Any], stamp: str
) -> dict[str, Any]:
    """What the ledger notes of a part that is about to be committed."""
    counts = {"rows": note["rows"], "failed": note["failed"], "begun": note.get("begun", "")}
    file = {"bytes": written.n_bytes, "digest": written.digest, "stamp": stamp}
    return {"run": run, "commit": name, **counts, **file}


def digest_of(file: BinaryIO) -> str:
    """Digest of a whole file, as ``write_part`` computes it."""
    sha = hashlib.blake2b(digest_size=16)
    while block := file.read(1 << 20):
        sha.update(block)
    return sha.hexdigest()


def note_of(metadata: pq.FileMetaData) -> dict[str, Any]:
    """The note in a part's metadata; empty if it has none."""
    note: dict[str, Any] = json.loads((metadata.metadata or {}).get(METADATA_KEY, b"{}"))
    return note


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
