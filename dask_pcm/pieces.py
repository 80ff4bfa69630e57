"""Parquet input as pieces: (file, row range), fixed before Dask's optimiser sees the frame.

A partition of a frame that ``read_parquet`` made is a piece. The optimiser may drop columns and
renumber partitions; it cannot regroup files, so a piece means the same rows in every run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.dataframe.utils import clear_known_categories
from dask.utils import parse_bytes

from dask_pcm.config import Config
from dask_pcm.digest import digest
from dask_pcm.errors import InputError
from dask_pcm.files import (
    NULLABLE,
    File,
    RowGroup,
    check_columns,
    index_columns,
    list_files,
    one_schema,
    path_text,
    redacted_repr,
)
from dask_pcm.reading import BATCH_BYTES, note_inflation, read_rows

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
        Arrow schema of every file, in the order of the first.
    files
        By path; for the ledger, not pickled with tasks.
    root
        What the user named: a file, a folder or a pattern.
    """

    def __init__(self, root: str, files: Sequence[File], columns: Sequence[str]) -> None:
        self.root = root
        self.files = {file.path: file for file in files}
        self.schema = one_schema(files)
        self.columns = tuple(columns)
        untyped = (f.name for file in files for f in file.schema if pa.types.is_null(f.type))
        nullable = frozenset(untyped).union(*(file.nullable for file in files))
        self.nullable = frozenset(
            name for name in nullable if self.schema.field(name).type in NULLABLE
        )
        self.has_own_index = bool(index_columns(self.schema))
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
        # A little at a time, so that only a little is there twice; but many small files at once.
        frames = [self.to_pandas(table)[names] for table in self._tables(spans, names)]
        frame = frames[0] if len(frames) == 1 else pd.concat(frames)
        if not self.has_own_index:
            frame.index = _row_numbers(spans)
        return frame

    def _tables(self, spans: Sequence[Span], names: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of `spans` in tables of some megabytes, at least one."""
        wanted = tuple(dict.fromkeys([*names, *index_columns(self.schema)]))
        fields = [self.schema.field(name).with_nullable(True) for name in wanted]
        schema = pa.schema(fields, self.schema.metadata)
        # Categories differ from table to table, so columns of them are converted in one piece.
        is_whole = any(pa.types.is_dictionary(field.type) for field in fields)
        found: list[pa.Table] = []
        n_bytes = 0
        for span in spans:
            rows = (span.start, span.stop, span.row_bytes)
            n_decoded = 0
            for table in read_rows(span.path, span.version, wanted, *rows):
                if found and not is_whole and n_bytes + table.nbytes > BATCH_BYTES:
                    yield pa.concat_tables(found)
                    found, n_bytes = [], 0
                found.append(table.cast(schema))
                n_bytes += table.nbytes
                n_decoded += table.nbytes
            note_inflation(span.path, n_decoded, span.n_bytes)
        yield pa.concat_tables(found)

    def to_pandas(self, table: pa.Table) -> pd.DataFrame:
        """Convert; integers and booleans that can be null get types that can say so."""
        frame = table.to_pandas()
        for name in self.nullable & set(frame.columns):
            if NULLABLE.get(table.schema.field(name).type) and frame[name].dtype.kind in "fO":
                frame[name] = table[name].to_pandas(types_mapper=NULLABLE.get).array
            elif frame[name].dtype.kind in "iub" and not _is_extension(frame[name]):
                frame[name] = frame[name].astype(NULLABLE[table.schema.field(name).type])
        return frame

    def meta(self) -> pd.DataFrame:
        """An empty frame with the columns and types of every piece."""
        names = [*self.columns, *index_columns(self.schema)]
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
    bytes_per_piece: int | str | None = None,
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
    bytes_per_piece
        No piece has more, as a number or as text ("64 MiB"), as far as a file's footer tells: bytes
        of its columns before compression. ``pcm.run.unit-bytes`` by default.

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
    path = path_text(path)
    if rows_per_piece < 1:
        raise InputError(f"rows_per_piece must be at least 1; found {rows_per_piece}.")
    limit = Config.read().unit_bytes if bytes_per_piece is None else parse_bytes(bytes_per_piece)
    if limit < 1:
        raise InputError(f"bytes_per_piece must be at least 1; found {bytes_per_piece}.")
    files = list_files(path, columns)
    names = check_columns(files[0], columns)
    reader = PieceReader(path, files, names)
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


def _is_extension(series: pd.Series) -> bool:
    return isinstance(series.dtype, pd.api.extensions.ExtensionDtype)
