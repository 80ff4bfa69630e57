"""Parquet input as pieces: (file, row range), fixed before Dask's optimiser sees the frame.

A partition of a frame that ``read_parquet`` made is a piece. The optimiser may drop columns and
renumber partitions; it cannot regroup files, so a piece means the same rows in every run.
"""

from __future__ import annotations

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
from dask_pcm.errors import InputError
from dask_pcm.parquet.arrow_types import plain
from dask_pcm.parquet.conversion import MISFITS, NULLABLE, extension_dtypes, to_pandas
from dask_pcm.parquet.cursors import BATCH_BYTES, note_inflation, read_rows
from dask_pcm.parquet.footers import File, RowGroup, column_names, describe_files
from dask_pcm.parquet.listing import AnyPath, find_files, path_texts
from dask_pcm.parquet.schemas import CommonSchema, is_unnamed_index
from dask_pcm.paths import redacted_repr

ROWS_PER_PIECE = 10_000


@dataclass(frozen=True, slots=True, repr=False)
class Span:
    """Rows `start` to `stop` of a file; `piece` numbers the piece, `offset` counts rows before.

    `start` and `stop` count within the file, `offset` within the whole input (of `start`).
    `version` says when the file was written, as it was found; `n_bytes` is an estimate.
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
        return self.stop - self.start

    @property
    def row_bytes(self) -> float:
        return self.n_bytes / max(1, self.n_rows)

    def cut(self, start: int, stop: int) -> Span:
        """Rows `start` to `stop`, counted from the beginning of this span."""
        n_bytes = round(self.row_bytes * (stop - start))
        offset = self.offset + start
        start, stop = self.start + start, self.start + stop
        return replace(self, start=start, stop=stop, offset=offset, n_bytes=n_bytes)


class PieceReader:
    """Reads spans; one object for a whole frame, carried by every read task.

    Attributes
    ----------
    schema
        Arrow types of the columns and of the index, which hold the values of every file.
    columns
        Names, in the order of the first file.
    index
        The column that is the index; None where rows are numbered.
    files
        By path; for the ledger, not pickled with tasks.
    roots
        What the user named: files and folders.
    """

    def __init__(
        self, roots: Sequence[str], files: Sequence[File], columns: Sequence[str] | None = None
    ) -> None:
        common = CommonSchema.of(files, columns)
        self.roots = tuple(roots)
        self.files = {file.path: file for file in files}
        self.columns, self.index = common.columns, common.index
        self._dtypes = extension_dtypes(common.schema, _nullable(common.schema, files))
        self.schema = common.schema.remove_metadata()
        self.token = digest([file.fingerprint for file in files], self.columns, str(self.schema))

    @property
    def has_own_index(self) -> bool:
        return self.index is not None

    def __call__(self, spans: Span | tuple[Span, ...], columns: Sequence[str]) -> pd.DataFrame:
        """Return the rows of `spans`, one below the other.

        Raises
        ------
        InputError
            Where a file has changed since it was listed, or holds what cannot be converted.
        """
        names = list(columns)
        spans = (spans,) if isinstance(spans, Span) else spans
        # A little at a time, so that only a little is there twice; but many small files at once.
        frames = [self._to_pandas(table, spans)[names] for table in self._tables(spans, names)]
        frame = frames[0] if len(frames) == 1 else pd.concat(frames)
        if not self.has_own_index:
            frame.index = _row_numbers(spans)
        return frame

    def _tables(self, spans: Sequence[Span], names: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of `spans` in tables of some megabytes, at least one."""
        schema = self._as_read(names)
        # Categories differ from table to table, so columns of them are converted in one piece.
        is_whole = any(pa.types.is_dictionary(field.type) for field in schema)
        found: list[pa.Table] = []
        n_bytes = 0
        for span in spans:
            rows = (span.start, span.stop, span.row_bytes)
            n_decoded = 0
            for table in read_rows(span.path, span.version, tuple(schema.names), *rows):
                if found and not is_whole and n_bytes + table.nbytes > BATCH_BYTES:
                    yield pa.concat_tables(found)
                    found, n_bytes = [], 0
                found.append(_cast(table, schema, span.path))
                n_bytes += table.nbytes
                n_decoded += table.nbytes
            note_inflation(span.path, n_decoded, span.n_bytes)
        yield pa.concat_tables(found)

    def _as_read(self, names: Sequence[str]) -> pa.Schema:
        """Columns of a table, with the types that values are converted from."""
        own = [] if self.index is None else [self.index]
        return pa.schema([(name, plain(self.schema.field(name).type)) for name in [*names, *own]])

    def _to_pandas(self, table: pa.Table, spans: Sequence[Span] = ()) -> pd.DataFrame:
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
        """An empty frame with the columns and types of every piece."""
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
    rows_per_piece: int = ROWS_PER_PIECE,
    columns: str | Iterable[str] | None = None,
    bytes_per_piece: int | str | None = None,
) -> dd.DataFrame:
    """Read a Parquet file or folder as an ordinary Dask DataFrame whose partitions are pieces.

    Parameters
    ----------
    path
        A file of any name; a folder; a pattern with ``*``, ``?``, ``[0-9]``, ``**`` (any depth)
        or ``{a,b}``, whose folders are read like these; an fsspec URL of these; or several of
        them as a list or another iterable. A folder is searched to any depth and through links,
        and each file in it is read once. Names that begin with ``_`` or ``.`` are left out, and
        so are files that neither have a suffix of Parquet (``.parquet``, ``.parq``, ``.pq``) nor
        begin as one; in object stores only those without a suffix are looked into.
    rows_per_piece
        Row groups of a file are put together until they have as many rows; a larger row group is
        split. Files are never put together.
    columns
        Columns to read, as names or as one name; all by default. Others may differ from file to
        file.
    bytes_per_piece
        No piece has more, as a number or as text ("64 MiB"), as far as a file's footer tells: bytes
        of its columns before compression. ``pcm.run.unit-bytes`` by default.

    Returns
    -------
    dask.dataframe.DataFrame
        Indexed by the row's number in the whole input, with known divisions, unless all files
        have the same pandas index, of one level. Integers and booleans with nulls become pandas'
        nullable types. A column whose type differs from file to file has one that holds the values
        of all (``docs/types.md``).

    Raises
    ------
    InputError
        Where there is no such input, rows in it could not be read (a link that leads nowhere, a
        file that is torn or no Parquet), or no type holds the values of a column in all files.
    SchemaError
        Where a column is asked for that is not there, or a name stands twice.
    """
    paths = path_texts(path)
    if rows_per_piece < 1:
        raise InputError(f"rows_per_piece must be at least 1; found {rows_per_piece}.")
    limit = Config.read().unit_bytes if bytes_per_piece is None else parse_bytes(bytes_per_piece)
    if limit < 1:
        raise InputError(f"bytes_per_piece must be at least 1; found {bytes_per_piece}.")
    names = None if columns is None else column_names(columns, "columns")
    roots, urls = find_files(paths)
    files = describe_files(urls, names)
    reader = PieceReader(roots, files, names)
    spans = list(_pieces(files, rows_per_piece, limit)) or [
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


def _pieces(files: Sequence[File], max_rows: int, max_bytes: int) -> Iterator[Span]:
    piece = offset = 0
    for file in files:
        start = 0
        for stop, n_bytes in cuts(file.row_groups, max_rows, max_bytes):
            yield Span(piece, file.path, file.modified, start, stop, offset, n_bytes)
            piece, offset, start = piece + 1, offset + stop - start, stop


def cuts(groups: Sequence[RowGroup], max_rows: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Row numbers at which pieces of a file end, and the bytes of each piece.

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
            # Near-equal parts: no crumb is left at the end of a row group.
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
    first, end = spans[0].offset, spans[-1].offset + spans[-1].n_rows
    if end - first == sum(span.n_rows for span in spans):
        return pd.RangeIndex(first, end)
    return pd.Index(np.concatenate([np.arange(s.offset, s.offset + s.n_rows) for s in spans]))


def _nullable(schema: pa.Schema, files: Sequence[File]) -> set[str]:
    """Columns that hold nulls, or may, and whose usual types of pandas cannot."""
    found = set()
    for name in schema.names:
        if plain(schema.field(name).type) in NULLABLE:
            own = (file for file in files if name in file.nullable)
            untyped = (f for f in files if pa.types.is_null(f.schema.field(name).type))
            if any(True for _ in own) or any(True for _ in untyped):
                found.add(name)
    return found


def _cast(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    try:
        return table.cast(schema)
    except pa.ArrowException as error:
        raise InputError(
            f"{path!r} holds what its footer does not tell of: {error}. Write it anew, or leave the"
            " column out with columns=[...]."
        ) from error


def _unreadable(
    table: pa.Table, dtypes: Mapping[str, Any], paths: Sequence[str], error: Exception
) -> InputError:
    """Which column it is that pandas or Python have no values for."""
    where = repr(paths[0]) + (f" or one of {len(paths) - 1} others" if len(paths) > 1 else "")
    for name in table.column_names:
        try:
            to_pandas(table.select([name]), dtypes if name in dtypes else {})
        except MISFITS as own:
            kind = table.schema.field(name).type
            return InputError(
                f"Column {name!r} of {where} is {kind} and has values that Python does not: {own}."
                " Leave it out with columns=[...], or cast it to text or a number in the files."
            )
    return InputError(f"Cannot convert rows of {where}: {error}")
