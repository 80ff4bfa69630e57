"""Parquet input as pieces: (file, row range), fixed before Dask's optimiser sees the frame.

A partition of a frame that ``read_parquet`` made is a piece. The optimiser may drop columns and
renumber partitions; it cannot regroup files, so a piece means the same rows in every run.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import dask
import dask.dataframe as dd
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.dataframe.utils import clear_known_categories
from dask.utils import natural_sort_key

from dask_pcm.digest import digest
from dask_pcm.errors import InputError, SchemaError

ROWS_PER_PIECE = 10_000
SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
_TAIL_BYTES = 64 * 1024
_N_READERS = 16
#: Pandas types that can hold a null where numpy's cannot.
_NULLABLE = {
    **{getattr(pa, f"int{n}")(): getattr(pd, f"Int{n}Dtype")() for n in (8, 16, 32, 64)},
    **{getattr(pa, f"uint{n}")(): getattr(pd, f"UInt{n}Dtype")() for n in (8, 16, 32, 64)},
    pa.bool_(): pd.BooleanDtype(),
}


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `stop` of a file; `piece` numbers the piece, `offset` counts rows before.

    `start` and `stop` count within the file, `offset` within the whole input (of `start`).
    `version` says when the file was written, as it was found.
    """

    piece: int
    path: str
    version: str
    start: int
    stop: int
    offset: int

    @property
    def n_rows(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> Span:
        """Rows `start` to `stop`, counted from the beginning of this span."""
        start, stop = self.start + start, self.start + stop
        return replace(self, start=start, stop=stop, offset=self.offset + start - self.start)


@dataclass(frozen=True, slots=True)
class File:
    """An input file as its footer describes it; the fingerprint tells whether it changed."""

    path: str
    size_bytes: int
    modified: str
    footer: str
    n_rows: int
    row_groups: tuple[int, ...]
    schema: pa.Schema
    nullable: frozenset[str]

    @property
    def fingerprint(self) -> dict[str, str | int]:
        return {"size": self.size_bytes, "modified": self.modified, "footer": self.footer}


class PieceReader:
    """Reads spans; one object for a whole frame, carried by every read task.

    Attributes
    ----------
    schema
        Arrow schema of every file, in the order of the first.
    files
        By path; for the ledger, not pickled with tasks.
    root
        What the user named: a file, a folder or a pattern.
    """

    def __init__(self, root: str, files: Sequence[File], columns: Sequence[str]) -> None:
        self.root = root
        self.files = {file.path: file for file in files}
        self.schema = files[0].schema
        self.columns = tuple(columns)
        self.nullable = frozenset().union(*(file.nullable for file in files))
        self.has_own_index = bool(_index_columns(self.schema))
        self.token = digest([file.fingerprint for file in files], self.columns, str(self.schema))

    def __call__(self, spans: Span | tuple[Span, ...], columns: Sequence[str]) -> pd.DataFrame:
        """Return the rows of `spans`, one below the other.

        Raises
        ------
        InputError
            Where a file has changed since it was listed.
        """
        names = list(columns)
        spans = (spans,) if isinstance(spans, Span) else spans
        frames = [self._read(span, names) for span in spans]
        return frames[0] if len(frames) == 1 else pd.concat(frames)

    def _read(self, span: Span, names: list[str]) -> pd.DataFrame:
        wanted = tuple(dict.fromkeys([*names, *_index_columns(self.schema)]))
        table = _read_rows(span, wanted)
        frame = self.to_pandas(table)[names]
        if not self.has_own_index:
            frame.index = pd.RangeIndex(span.offset, span.offset + span.n_rows)
        return frame

    def to_pandas(self, table: pa.Table) -> pd.DataFrame:
        """Convert; integers and booleans that can be null get types that can say so."""
        frame = table.to_pandas()
        for name in self.nullable & set(frame.columns):
            if _NULLABLE.get(table.schema.field(name).type) and frame[name].dtype.kind in "fO":
                frame[name] = table[name].to_pandas(types_mapper=_NULLABLE.get).array
            elif frame[name].dtype.kind in "iub" and not _is_extension(frame[name]):
                frame[name] = frame[name].astype(_NULLABLE[table.schema.field(name).type])
        return frame

    def meta(self) -> pd.DataFrame:
        """An empty frame with the columns and types of every piece."""
        names = [*self.columns, *_index_columns(self.schema)]
        table = self.schema.empty_table().select(list(dict.fromkeys(names)))
        frame = clear_known_categories(self.to_pandas(table)[list(self.columns)])
        return frame if self.has_own_index else frame.set_axis(pd.RangeIndex(0))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.PieceReader", self.token)


def read_parquet(
    path: str | os.PathLike[str],
    rows_per_piece: int = ROWS_PER_PIECE,
    columns: Sequence[str] | None = None,
) -> dd.DataFrame:
    """Read a Parquet file or folder as an ordinary Dask DataFrame whose partitions are pieces.

    Parameters
    ----------
    path
        A file, a folder (searched below; names that begin with ``_`` or ``.`` are left out), a
        pattern with ``*``, or an fsspec URL of these.
    rows_per_piece
        Row groups of a file are put together until they have as many rows; a larger row group is
        split. Files are never put together.
    columns
        Columns to read; all by default.

    Returns
    -------
    dask.dataframe.DataFrame
        Indexed by the row's number in the whole input, with known divisions, unless the files
        carry a pandas index of their own. Integers and booleans with nulls become pandas'
        nullable types.

    Raises
    ------
    InputError
        Where there is no such input, a file is not Parquet or torn, or schemas differ.
    SchemaError
        Where a column is asked for that is not there, or a name stands twice.
    """
    path = os.fspath(path)
    if rows_per_piece < 1:
        raise InputError(f"rows_per_piece must be at least 1; found {rows_per_piece}.")
    files = list_files(path)
    names = _check_columns(files[0], columns)
    _check_schemas(files)
    reader = PieceReader(path, files, names)
    spans = list(_pieces(files, rows_per_piece)) or [
        Span(0, files[0].path, files[0].modified, 0, 0, 0)
    ]
    divisions = None
    if not reader.has_own_index and spans[-1].stop:
        divisions = (*(span.offset for span in spans), spans[-1].offset + spans[-1].n_rows - 1)
    # Dask would turn every object column into text: lists, bytes and decimals among them.
    with dask.config.set({"dataframe.convert-string": False}):
        return dd.from_map(
            reader, spans, meta=reader.meta(), divisions=divisions, label="read-pieces"
        )


def list_files(path: str) -> list[File]:
    """Find the Parquet files of an input and read their footers, in natural order of names."""
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise InputError(f"Cannot open the input {path!r}: {error}") from error
    if "*" in root:
        found = fs.glob(root)
    elif fs.isdir(root):
        found = fs.find(root)
    elif fs.exists(root):
        found = [root]
    else:
        raise InputError(f"There is no input at {path!r}.")
    paths = [name for name in found if len(found) == 1 or _is_data(name, root)]
    if not paths or (fs.isdir(root) and not _is_data(paths[0], root)):
        others = f"; it holds {len(found)} other files, such as {found[0]!r}" if found else ""
        raise InputError(f"There are no Parquet files ({', '.join(SUFFIXES)}) in {path!r}{others}.")
    if partitioned := [name for name in paths if "=" in name[len(root) :].rpartition("/")[0]]:
        raise InputError(
            f"{path!r} is partitioned by folder names ({partitioned[0]!r}), whose columns"
            " pcm.read_parquet does not read. Read it with dask.dataframe.read_parquet."
        )
    paths.sort(key=natural_sort_key)
    with ThreadPoolExecutor(_N_READERS) as pool:
        return list(pool.map(lambda name: _describe(fs.unstrip_protocol(name)), paths))


def _is_data(name: str, root: str) -> bool:
    below = name[len(root.partition("*")[0]) :] if name != root else name.rpartition("/")[2]
    is_hidden = any(part.startswith(("_", ".")) for part in below.split("/"))
    return name.endswith(SUFFIXES) and not is_hidden


def _describe(url: str) -> File:
    try:
        fs, path = fsspec.core.url_to_fs(url)
        info = fs.info(path)
        with fs.open(path, "rb") as file:
            footer = _footer(file, info["size"], url)
            file.seek(0)
            metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowInvalid, EOFError) as error:
        raise InputError(f"Cannot read {url!r} as Parquet: {error}") from error
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return File(
        path=url,
        size_bytes=info["size"],
        modified=_version(info),
        footer=hashlib.sha256(footer).hexdigest()[:32],
        n_rows=metadata.num_rows,
        row_groups=tuple(group.num_rows for group in groups),
        schema=schema,
        nullable=_with_nulls(schema, metadata),
    )


def _footer(file: Any, size: int, url: str) -> bytes:
    """The raw footer: it names every column chunk's sizes, offsets and statistics."""
    if size < 12:
        raise InputError(f"{url!r} is not a Parquet file: it has {size} bytes.")
    head = file.read(4)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read()
    if head != _MAGIC:
        raise InputError(f"{url!r} is not a Parquet file: it begins with {head!r}, not {_MAGIC!r}.")
    if tail[-4:] != _MAGIC:
        raise InputError(
            f"{url!r} is torn: it begins as a Parquet file but its end is missing. Whoever wrote"
            " it was interrupted; write it again."
        )
    n_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if n_bytes > len(tail):
        file.seek(max(0, size - n_bytes))
        tail = file.read()
    return bytes(tail[-n_bytes:])


def _with_nulls(schema: pa.Schema, metadata: pq.FileMetaData) -> frozenset[str]:
    """Integer and boolean columns in which a null stands, or may stand for all we know."""
    names = {field.name for field in schema if field.type in _NULLABLE}
    found = set()
    for group in range(metadata.num_row_groups):
        if not metadata.row_group(group).num_rows:
            continue
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            statistics = column.statistics
            is_known = statistics is not None and statistics.has_null_count
            if column.path_in_schema in names and (not is_known or statistics.null_count):
                found.add(column.path_in_schema)
    return frozenset(found)


def _pieces(files: Sequence[File], rows_per_piece: int) -> Iterator[Span]:
    piece = offset = 0
    for file in files:
        start = 0
        for stop in _cuts(file.row_groups, rows_per_piece):
            yield Span(piece, file.path, file.modified, start, stop, offset)
            piece, offset, start = piece + 1, offset + stop - start, stop


def _cuts(row_groups: Sequence[int], rows_per_piece: int) -> Iterator[int]:
    """Row numbers at which pieces of a file end."""
    start = end = 0
    for n_rows in row_groups:
        if end > start and end + n_rows - start > rows_per_piece:
            yield end
            start = end
        end += n_rows
        while end - start > rows_per_piece:
            # Near-equal parts: no crumb is left at the end of a row group.
            n_parts = -(-(end - start) // rows_per_piece)
            start += -(-(end - start) // n_parts)
            yield start
    if end > start:
        yield end


def _check_columns(file: File, columns: Sequence[str] | None) -> list[str]:
    names = file.schema.names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SchemaError(f"Columns of {file.path!r} stand more than once: {', '.join(repeated)}.")
    if columns is None:
        return [name for name in names if name not in _index_columns(file.schema)]
    if missing := [name for name in columns if name not in names]:
        raise SchemaError(
            f"{file.path!r} has no column {', '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, names))}."
        )
    return list(columns)


def _check_schemas(files: Sequence[File]) -> None:
    first = {field.name: field.type for field in files[0].schema}
    for file in files[1:]:
        other = {field.name: field.type for field in file.schema}
        if other == first:
            continue
        name = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))[0]
        raise InputError(
            f"The schema of {file.path!r} differs from that of {files[0].path!r}: column {name!r}"
            f" is {other.get(name, 'missing')} here and {first.get(name, 'missing')} there."
        )


def _index_columns(schema: pa.Schema) -> list[str]:
    """Columns that pandas stored an index in; none for a plain range."""
    stored = (schema.pandas_metadata or {}).get("index_columns", [])
    return [name for name in stored if isinstance(name, str) and name in schema.names]


def _is_extension(series: pd.Series) -> bool:
    return isinstance(series.dtype, pd.api.extensions.ExtensionDtype)


def _version(info: Mapping[str, Any]) -> str:
    """When a file was written, or another sign that it is still the same."""
    sign = info.get("mtime", info.get("LastModified", info.get("ETag", "")))
    return sign.isoformat() if isinstance(sign, datetime) else repr(sign)


def _read_rows(span: Span, columns: tuple[str, ...]) -> pa.Table:
    if span.start == span.stop:
        with _open(span.path, span.version) as file:
            return file.schema_arrow.empty_table().select(list(columns))
    tables, first = [], 0
    for group, n_rows in enumerate(_row_groups(span.path, span.version)):
        last = first + n_rows
        if last > span.start and first < span.stop:
            table = _read_row_group(span.path, span.version, group, columns)
            start, stop = max(span.start, first), min(span.stop, last)
            tables.append(table.slice(start - first, stop - start))
        first = last
    return pa.concat_tables(tables)


@contextmanager
def _open(path: str, version: str) -> Iterator[pq.ParquetFile]:
    try:
        fs, name = fsspec.core.url_to_fs(path)
        if _version(fs.info(name)) != version:
            raise InputError(
                f"{path!r} has changed since it was listed. Write it before the run begins, and"
                " call pcm.read_parquet again."
            )
        with fs.open(name, "rb") as file:
            yield pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"Cannot read {path!r}: {error}") from error


@functools.lru_cache(maxsize=1024)
def _row_groups(path: str, version: str) -> tuple[int, ...]:
    with _open(path, version) as file:
        metadata = file.metadata
        return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


@functools.lru_cache(maxsize=2)
def _read_row_group(path: str, version: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    # The last two stay at hand: several units are cut from one row group.
    with _open(path, version) as file:
        return file.read_row_group(group, columns=list(columns))
