"""A piece is a file and a row range, fixed before Dask's optimiser sees the frame.

Each partition of a frame made by ``read_parquet`` is a piece. The optimiser may drop columns and
renumber partitions, but it cannot regroup files. So a piece holds the same rows in every run, and
the ledger can record progress by piece.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.dataframe.utils import clear_known_categories
from dask.utils import parse_bytes

from dask_pcm.arguments import checked
from dask_pcm.config import Config
from dask_pcm.context.identity.digest import digest
from dask_pcm.errors import InputError, SchemaError
from dask_pcm.parquet.arrow_types import plain
from dask_pcm.parquet.conversion import MISFITS, NULLABLE, extension_dtypes, to_pandas
from dask_pcm.parquet.cursors import BATCH_BYTES, note_inflation, read_rows
from dask_pcm.parquet.filters import (
    Filters,
    alternatives,
    filter_columns,
    matching,
    matching_groups,
)
from dask_pcm.parquet.footers import File, RowGroup, column_names, describe_files
from dask_pcm.parquet.listing import AnyPath, find_files, path_texts
from dask_pcm.parquet.schemas import CommonSchema, is_unnamed_index
from dask_pcm.paths import redacted_repr

ROWS_PER_PIECE = 10_000


@dataclass(frozen=True, slots=True, repr=False)
class Span:
    """Rows ``start:stop`` of a file.

    Attributes
    ----------
    piece
        Number of the piece within the input.
    path
        Path or URL of the file.
    version
        The file's modification time or ETag when it was listed.
    start, stop
        Row numbers within the file; `stop` is exclusive.
    offset
        Row number of `start` within the whole input.
    n_bytes
        Estimated size of the rows in bytes, from the footer.
    """

    piece: int
    path: str
    version: str
    start: int
    stop: int
    offset: int
    n_bytes: int = 0

    __repr__ = redacted_repr

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def row_bytes(self) -> float:
        """Estimated bytes per row."""
        return self.n_bytes / max(1, self.n_rows)

    def cut(self, start: int, stop: int) -> Span:
        """Rows ``start:stop`` of this span, counted from its first row."""
        n_bytes = round(self.row_bytes * (stop - start))
        offset = self.offset + start
        start, stop = self.start + start, self.start + stop
        return replace(self, start=start, stop=stop, offset=offset, n_bytes=n_bytes)


class PieceReader:
    """Reads spans into pandas frames; every read task of a frame holds the same reader.

    Attributes
    ----------
    schema
        Arrow types of the columns and the index, wide enough for the values of all files.
    columns
        Column names, in the order of the first file.
    index
        The column that becomes the index; None to index by row number.
    files
        Files by path, for the ledger; not pickled with tasks.
    roots
        The files and folders that the user named.
    """

    def __init__(
        self,
        roots: Sequence[str],
        files: Sequence[File],
        columns: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        common = CommonSchema.of(files, columns)
        self.roots = tuple(roots)
        #: Options of the filesystem, perhaps with keys: workers need them, and nothing else does.
        self._options = dict(options or {})
        self.files = {file.path: file for file in files}
        self.columns, self.index = common.columns, common.index
        self._dtypes = extension_dtypes(common.schema, _nullable(common.schema, files))
        self.schema = common.schema.remove_metadata()
        self.token = digest([file.fingerprint for file in files], self.columns, str(self.schema))

    @property
    def has_own_index(self) -> bool:
        """Whether the index is stored in the files."""
        return self.index is not None

    def __call__(self, spans: Span | tuple[Span, ...], columns: Sequence[str]) -> pd.DataFrame:
        """Return the rows of `spans`, concatenated in order.

        Raises
        ------
        InputError
            If a file has changed since it was listed, or holds values that cannot be converted.
        """
        names = list(columns)
        spans = (spans,) if isinstance(spans, Span) else spans
        # Convert a few megabytes at a time: only those exist twice, as Arrow and as pandas. Rows
        # of many small files are converted together.
        frames = [self._to_pandas(table, spans)[names] for table in self._tables(spans, names)]
        frame = frames[0] if len(frames) == 1 else pd.concat(frames)
        if not self.has_own_index:
            frame.index = _row_numbers(spans)
        return frame

    def _tables(self, spans: Sequence[Span], names: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of `spans` in tables of about ``BATCH_BYTES``; at least one table."""
        schema = self._as_read(names)
        # Each table has its own categories, and pandas concatenates different categoricals as
        # objects. So with categorical columns, all spans become one table.
        is_whole = any(pa.types.is_dictionary(field.type) for field in schema)
        found: list[pa.Table] = []
        n_bytes = 0
        for span in spans:
            rows = (span.start, span.stop, span.row_bytes)
            n_decoded = 0
            for table in read_rows(
                span.path, span.version, tuple(schema.names), *rows, self._options
            ):
                if found and not is_whole and n_bytes + table.nbytes > BATCH_BYTES:
                    yield pa.concat_tables(found)
                    found, n_bytes = [], 0
                found.append(_cast(table, schema, span.path))
                n_bytes += table.nbytes
                n_decoded += table.nbytes
            note_inflation(span.path, n_decoded, span.n_bytes)
        yield pa.concat_tables(found)

    def _as_read(self, names: Sequence[str]) -> pa.Schema:
        """The schema of tables before their conversion to pandas, index included."""
        own = [] if self.index is None else [self.index]
        return pa.schema([(name, plain(self.schema.field(name).type)) for name in [*names, *own]])

    def _to_pandas(self, table: pa.Table, spans: Sequence[Span] = ()) -> pd.DataFrame:
        """Convert a table and set its index; `spans` name the files in an error."""
        dtypes = {name: self._dtypes[name] for name in table.column_names if name in self._dtypes}
        try:
            frame = to_pandas(table, dtypes)
        except MISFITS as error:
            paths = [span.path for span in spans] or list(self.files)
            raise _unreadable(table, dtypes, paths, error) from error
        if self.index is None:
            return frame
        frame = frame.set_index(self.index)
        return frame.rename_axis(index=None) if is_unnamed_index(self.index) else frame

    def meta(self) -> pd.DataFrame:
        """An empty frame with the columns and dtypes of every piece."""
        table = self._as_read(self.columns).empty_table()
        frame = clear_known_categories(self._to_pandas(table)[list(self.columns)])
        return frame if self.has_own_index else frame.set_axis(pd.RangeIndex(0))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.PieceReader", self.token)


@checked
def read_parquet(
    path: AnyPath | Iterable[AnyPath],
    columns: str | Iterable[str] | None = None,
    *,
    rows_per_piece: int = ROWS_PER_PIECE,
    bytes_per_piece: int | str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filters: Filters | None = None,
) -> dd.DataFrame:
    """Read Parquet files as an ordinary Dask DataFrame whose partitions are pieces.

    Parameters
    ----------
    path : str, path-like or iterable of these
        A file of any name, a folder, or a glob pattern with ``*``, ``?``, ``[0-9]``, ``**`` (any
        depth) or ``{a,b}``; a path or an fsspec URL; one or several. Folders are searched
        recursively and through symbolic links, and each file is read once. In folders, names that
        begin with ``_`` or ``.`` are skipped, and so are files that have neither a Parquet suffix
        (``.parquet``, ``.parq``, ``.pq``) nor the Parquet magic bytes. In object stores, only
        files without a suffix are opened to look for these bytes.
    columns : str or iterable of str, optional
        Columns to read. All by default. Only these need to agree between files.
    rows_per_piece : int, default 10,000
        Maximum number of rows in a piece. Consecutive row groups of a file are merged up to it,
        and larger row groups are split. A piece never spans files.
    bytes_per_piece : int or str, optional
        Maximum size of a piece, in bytes or as text ("64 MiB"): its columns before compression, as
        estimated from the file's footer. ``pcm.run.unit-bytes`` by default.
    storage_options : dict, optional
        Options of the fsspec filesystem of `path`, such as credentials or an endpoint. Workers get
        them with their tasks; they are in no manifest, report or log, and do not tell jobs apart.
    filters : list of tuple, or list of list of tuple, optional
        Conditions ``(column, operator, value)`` with the operators ``==``, ``!=``, ``<``, ``<=``,
        ``>``, ``>=``, ``in`` and ``not in``, as pandas and Dask take them: rows for which all of a
        list hold, for one of several lists. Row groups that cannot hold such rows, by their
        statistics, are not read. A condition on a null does not hold.

    Returns
    -------
    dask.dataframe.DataFrame
        Indexed by row number within the whole input, with known divisions; or by the pandas index
        of the files, if all of them store the same index with one level. Integers and booleans with
        nulls get pandas' nullable dtypes. A column whose type differs between files gets a type
        that holds the values of all (``docs/types.md``).

    Raises
    ------
    InputError
        If the input does not exist, some of it cannot be read (a dangling link, a truncated file,
        a file that is not Parquet), or no type holds the values of a column in all files.
    SchemaError
        If a requested column does not exist or a name is repeated, or `filters` do not fit.
    """
    paths = path_texts(path)
    if rows_per_piece < 1:
        raise InputError(f"rows_per_piece must be at least 1; found {rows_per_piece}.")
    limit = Config.read().unit_bytes if bytes_per_piece is None else parse_bytes(bytes_per_piece)
    if limit < 1:
        raise InputError(f"bytes_per_piece must be at least 1; found {bytes_per_piece}.")
    names = None if columns is None else column_names(columns, "columns")
    wanted, read, kept = names, names, None
    if filters is not None:
        conditions = alternatives(filters)
        kept = functools.partial(matching_groups, filters=conditions)
        if names is not None:  # conditions may be on other columns
            read = list(dict.fromkeys([*names, *filter_columns(conditions)]))
    roots, urls = find_files(paths, storage_options)
    files = describe_files(urls, read, storage_options, kept)
    reader = PieceReader(roots, files, read, storage_options)
    spans = list(_pieces(files, rows_per_piece, limit)) or [
        Span(0, files[0].path, files[0].modified, 0, 0, 0)
    ]
    divisions = None
    if not reader.has_own_index and spans[-1].stop:
        divisions = (*(span.offset for span in spans), spans[-1].offset + spans[-1].n_rows - 1)
    # Dask would convert every object column to text, including lists, bytes and decimals.
    with dask.config.set({"dataframe.convert-string": False}):
        frame = dd.from_map(
            reader, spans, meta=reader.meta(), divisions=divisions, label="read-pieces"
        )
        if filters is not None:
            _check_there(filter_columns(conditions), frame.columns)
            frame = matching(frame, conditions)
        return frame if wanted == read else frame[wanted]


def _check_there(names: Iterable[str], columns: Iterable[str]) -> None:
    """Raise SchemaError for columns that filters name and the input does not have."""
    if missing := [name for name in names if name not in columns]:
        raise SchemaError(
            f"filters names {', '.join(map(repr, missing))}, which the input does not have; its"
            f" columns are {', '.join(map(repr, columns))}."
        )


def _pieces(files: Sequence[File], max_rows: int, max_bytes: int) -> Iterator[Span]:
    """Cut every file into pieces, numbered in order."""
    piece = offset = 0
    for file in files:
        for number, groups in _runs_of_groups(file):
            first = sum(group.n_rows for group in file.row_groups[:number])
            start = first
            for stop, n_bytes in cuts(groups, max_rows, max_bytes):
                stop += first
                yield Span(piece, file.path, file.modified, start, stop, offset + start, n_bytes)
                piece, start = piece + 1, stop
        offset += file.n_rows


def _runs_of_groups(file: File) -> Iterator[tuple[int, list[RowGroup]]]:
    """Successive row groups that are read, with the number of the first."""
    numbers = range(len(file.row_groups)) if file.kept is None else sorted(file.kept)
    # Of successive numbers, each less its place is the same.
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], [file.row_groups[number] for number in found]


def cuts(groups: Sequence[RowGroup], max_rows: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut the row groups of a file into pieces; yield each piece's end row and size in bytes.

    >>> list(cuts([RowGroup(10, 40), RowGroup(5, 20), RowGroup(30, 900)], 20, 400))
    [(15, 60), (25, 300), (35, 300), (45, 300)]
    """
    start = end = n_bytes = 0
    for group in groups:
        n_parts = max(-(-group.n_rows // max_rows), -(-group.n_bytes // max_bytes), 1)
        is_full = end - start + group.n_rows > max_rows or n_bytes + group.n_bytes > max_bytes
        if end > start and is_full:
            yield end, n_bytes
            start, n_bytes = end, 0
        if n_parts > 1:
            # Parts of nearly equal size, so that no row group ends in a tiny piece.
            edges = [end + group.n_rows * part // n_parts for part in range(1, n_parts + 1)]
            for stop in dict.fromkeys(edge for edge in edges if edge > end):
                yield stop, round(group.n_bytes * (stop - start) / group.n_rows)
                start = stop
            end = start
        else:
            end, n_bytes = end + group.n_rows, n_bytes + group.n_bytes
    if end > start:
        yield end, n_bytes


def _row_numbers(spans: Sequence[Span]) -> pd.Index:
    """The row numbers of spans within the input; a RangeIndex if they are contiguous."""
    first, end = spans[0].offset, spans[-1].offset + spans[-1].n_rows
    if end - first == sum(span.n_rows for span in spans):
        return pd.RangeIndex(first, end)
    return pd.Index(np.concatenate([np.arange(s.offset, s.offset + s.n_rows) for s in spans]))


def _nullable(schema: pa.Schema, files: Sequence[File]) -> set[str]:
    """Integer and boolean columns that hold nulls, or may: numpy's dtypes have no null."""
    found = set()
    for name in schema.names:
        if plain(schema.field(name).type) in NULLABLE:
            own = (file for file in files if name in file.nullable)
            untyped = (f for f in files if pa.types.is_null(f.schema.field(name).type))
            if any(True for _ in own) or any(True for _ in untyped):
                found.add(name)
    return found


def _cast(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    """Cast a table to the common schema; InputError if the footer was wrong about its values."""
    if table.schema.equals(schema):
        return table
    try:
        return table.cast(schema)
    except pa.ArrowException as error:
        raise InputError(
            f"{path!r} holds values that contradict its footer: {error}. Rewrite the file, or omit"
            " the column with columns=[...]."
        ) from error


def _unreadable(
    table: pa.Table, dtypes: Mapping[str, Any], paths: Sequence[str], error: Exception
) -> InputError:
    """The error for a table that cannot be converted; it names the column at fault.

    Columns are converted one by one, since Arrow's own error does not name the column.
    """
    where = repr(paths[0]) + (f" or one of {len(paths) - 1} others" if len(paths) > 1 else "")
    for name in table.column_names:
        try:
            to_pandas(table.select([name]), dtypes if name in dtypes else {})
        except MISFITS as own:
            kind = table.schema.field(name).type
            return InputError(
                f"Column {name!r} of {where} is {kind} and has values that Python cannot represent:"
                f" {own}. Omit it with columns=[...], or cast it to text or a number in the files."
            )
    return InputError(f"Cannot convert rows of {where}: {error}")
