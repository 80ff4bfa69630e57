"""Everything known about an input before rows are read comes from the footers of its files.

Footers give row counts, sizes, schemas, nulls and value bounds, and their hash is the fingerprint
that shows whether a file has changed between runs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.errors import InputError, SchemaError, shown_cause
from dask_pcm.parquet.arrow_types import Bounds, is_bounded, n_leaves, plain
from dask_pcm.parquet.conversion import NULLABLE, pandas_notes
from dask_pcm.paths import redacted_repr, version_of

SUFFIXES = (".parquet", ".parq", ".pq")
MAGIC = b"PAR1"
_TAIL_BYTES = 64 * 1024
_N_READERS = 16


class RowGroup(NamedTuple):
    """Number of rows, and bytes of the requested columns before compression."""

    n_rows: int
    n_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class File:
    """An input file as its footer describes it.

    Attributes
    ----------
    path
        Path or URL.
    modified
        ETag or modification time; see ``paths.version_of``.
    footer
        Hash of the raw footer.
    nullable
        Integer and boolean columns that contain nulls, or whose footer does not say.
    bounds
        Least and greatest value of integer, timestamp and duration columns, if the footer has them;
        0 is always within.
    kept
        The row groups that may hold rows which are asked for; None for all.
    """

    path: str
    size_bytes: int
    modified: str
    footer: str
    n_rows: int
    row_groups: tuple[RowGroup, ...]
    schema: pa.Schema
    nullable: frozenset[str]
    bounds: Mapping[str, Bounds]
    kept: frozenset[int] | None = None

    __repr__ = redacted_repr

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What differs if the file has changed; recorded in manifests."""
        return {"size": self.size_bytes, "modified": self.modified, "footer": self.footer}


def describe_files(
    urls: Sequence[str],
    columns: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    kept: Callable[[Any, str], Iterable[int] | None] | None = None,
) -> list[File]:
    """Read the footers of files, in parallel.

    Sizes count the bytes of `columns`, or of all columns by default. `options` are those of the
    filesystem; `kept` selects row groups of a file, given its filesystem and path.

    Raises
    ------
    InputError
        If a file cannot be read or is not a complete Parquet file.
    """
    with ThreadPoolExecutor(_N_READERS) as pool:
        return list(pool.map(lambda url: _describe(url, columns, options or {}, kept), urls))


def _describe(
    url: str,
    columns: Sequence[str] | None,
    options: Mapping[str, Any],
    kept: Callable[[Any, str], Iterable[int] | None] | None,
) -> File:
    """Read one footer; InputError if the file is not a complete Parquet file."""
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
        info = file_info(fs, path)
        with fs.open(path, "rb") as file:
            footer = _footer(file, info["size"], url)
            file.seek(0)
            metadata = pq.read_metadata(file)
        groups = None if kept is None else kept(fs, path)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException, EOFError) as error:
        raise InputError(f"Cannot read {url!r} as Parquet: {error}") from shown_cause(error)
    row_groups = tuple(_row_groups(metadata, schema, columns))
    nullable, bounds = _with_nulls(schema, metadata), _bounds(schema, metadata)
    counted = counted_index(schema)
    if counted is not None and counted.name not in schema.names:
        schema = schema.append(pa.field(counted.name, pa.int64()))
    return File(
        path=url,
        size_bytes=info["size"],
        modified=version_of(info),
        footer=hashlib.sha256(footer).hexdigest()[:32],
        n_rows=metadata.num_rows,
        row_groups=row_groups,
        schema=schema,
        nullable=nullable,
        bounds=bounds,
        kept=None if groups is None else frozenset(groups),
    )


def _row_groups(
    metadata: pq.FileMetaData, schema: pa.Schema, columns: Sequence[str] | None
) -> Iterator[RowGroup]:
    """Rows and bytes of each row group; bytes of all columns if leaves cannot be matched."""
    leaves = [field.name for field in schema for _ in range(n_leaves(field.type))]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        n_bytes = group.total_byte_size
        if columns is not None and len(leaves) == metadata.num_columns:
            wanted = (i for i, name in enumerate(leaves) if name in columns)
            n_bytes = sum(group.column(i).total_uncompressed_size for i in wanted)
        yield RowGroup(group.num_rows, n_bytes)


def _footer(file: Any, size: int, url: str) -> bytes:
    """The raw footer, which contains sizes, offsets and statistics of every column chunk."""
    if size < 12:
        raise InputError(f"{url!r} is not a Parquet file: it has {size} bytes.")
    head = file.read(4)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read()
    if head != MAGIC:
        raise InputError(f"{url!r} is not a Parquet file: it begins with {head!r}, not {MAGIC!r}.")
    if tail[-4:] != MAGIC:
        raise InputError(
            f"{url!r} is truncated: it begins as a Parquet file but its footer is missing. Its"
            " writer was interrupted; write it again."
        )
    n_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if n_bytes > len(tail):
        file.seek(max(0, size - n_bytes))
        tail = file.read()
    return bytes(tail[-n_bytes:])


def _with_nulls(schema: pa.Schema, metadata: pq.FileMetaData) -> frozenset[str]:
    """Integer and boolean columns that contain nulls, or whose statistics do not say."""
    names = {field.name for field in schema if plain(field.type) in NULLABLE}
    found = set()
    for column in _chunks(metadata, names):
        statistics = column.statistics
        is_known = statistics is not None and statistics.has_null_count
        if not is_known or statistics.null_count:
            found.add(column.path_in_schema)
    return frozenset(found)


def _bounds(schema: pa.Schema, metadata: pq.FileMetaData) -> dict[str, Bounds]:
    """Least and greatest value of integer, timestamp and duration columns with statistics.

    A column is left out if any of its chunks has values but no statistics.
    """
    kinds = {field.name: field.type for field in schema if is_bounded(field.type)}
    found: dict[str, Bounds] = dict.fromkeys(kinds, (0, 0))
    unknown = set()
    for column in _chunks(metadata, kinds.keys()):
        name, statistics = column.path_in_schema, column.statistics
        if statistics is not None and statistics.has_min_max:
            low, high = int(statistics.min_raw), int(statistics.max_raw)
            # Statistics store unsigned values as signed ones of the same bits.
            is_unsigned = pa.types.is_unsigned_integer(kinds[name])
            low, high = (low % 2**64, high % 2**64) if is_unsigned else (low, high)
            found[name] = min(low, found[name][0]), max(high, found[name][1])
        elif statistics is None or statistics.null_count != column.num_values:
            unknown.add(name)
    return {name: bounds for name, bounds in found.items() if name not in unknown}


def _chunks(metadata: pq.FileMetaData, names: Set[str]) -> Iterator[pq.ColumnChunkMetaData]:
    """Non-empty column chunks of the named columns; nested columns have longer paths."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = (group.column(i) for i in range(metadata.num_columns) if group.num_rows)
        yield from (column for column in columns if column.path_in_schema in names)


def column_names(names: Iterable[str] | str, what: str) -> list[str]:
    """Column names as a list; `what` is the option's name in errors.

    Raises
    ------
    SchemaError
        If a name is not a string, or is repeated.
    """
    found: list[Any] = (
        [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    )
    if wrong := [name for name in found if not isinstance(name, str)]:
        hint = " For a number of rows, use rows_per_piece=." if isinstance(wrong[0], int) else ""
        raise SchemaError(
            f"{what} takes a list of column names, which are strings in Parquet files; found"
            f" {wrong[0]!r:.80}.{hint}"
        )
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise SchemaError(f"{what} names {', '.join(map(repr, repeated))} more than once.")
    return found


@dataclass(frozen=True, slots=True)
class CountedIndex:
    """A named pandas RangeIndex: its values are not stored but follow from the row number."""

    name: str
    start: int
    step: int

    def column(self, first: int, n_rows: int) -> pa.Array:
        """The values of `n_rows` rows from row `first` on, as int64."""
        return pa.array(self.start + self.step * np.arange(first, first + n_rows), pa.int64())


def counted_index(schema: pa.Schema) -> CountedIndex | None:
    """The named RangeIndex in a file's pandas metadata; None for any other index."""
    for about in pandas_notes(schema).get("index_columns") or ():
        if isinstance(about, dict) and isinstance(name := about.get("name"), str):
            return CountedIndex(name, about["start"], about["step"])
    return None


def index_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Columns that form the pandas index; none for an unnamed RangeIndex."""
    noted = pandas_notes(schema).get("index_columns") or ()
    names = (about.get("name") if isinstance(about, dict) else about for about in noted)
    return tuple(name for name in names if isinstance(name, str) and name in schema.names)


def file_info(fs: Any, path: str) -> dict[str, Any]:
    """fsspec's info of a file; for a symbolic link, size and time of its target."""
    info: dict[str, Any] = fs.info(path)
    if not info.get("islink"):
        return info
    status = os.stat(path)
    return {**info, "size": status.st_size, "mtime": status.st_mtime}
