"""Parts of an output: their names, and how one is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
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


def write_part(file: BinaryIO, tables: Iterable[pa.Table], note: Mapping[str, Any]) -> Written:
    """Write tables of one schema, a row group each, with a note in the file's metadata."""
    hashing = _Hashing(file)
    writer = None
    for table in tables:
        if writer is None:
            metadata = {**(table.schema.metadata or {}), METADATA_KEY: json.dumps(note).encode()}
            schema = table.schema.with_metadata(metadata)
            writer = pq.ParquetWriter(pa.PythonFile(hashing, "w"), schema)
        writer.write_table(table.cast(schema))
    if writer is None:
        raise ValueError("a part needs at least one table, even if it has no rows")
    writer.close()
    return Written(hashing.n_bytes, hashing.hash.hexdigest())


def digest_of(file: BinaryIO) -> str:
    """Digest of a whole file, as ``write_part`` computes it."""
    sha = hashlib.blake2b(digest_size=16)
    while block := file.read(1 << 20):
        sha.update(block)
    return sha.hexdigest()


def note_of(schema: pa.Schema) -> dict[str, Any]:
    """The note in a part's metadata; empty if it has none."""
    note: dict[str, Any] = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
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
