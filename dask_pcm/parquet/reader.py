"""Spans of files, and the reader that turns them into frames; on workers, without Dask's frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_pcm.context.identity.digest import digest
from dask_pcm.errors import InputError
from dask_pcm.parquet.arrow_types import plain
from dask_pcm.parquet.conversion import MISFITS, NULLABLE, extension_dtypes, to_pandas
from dask_pcm.parquet.cursors import BATCH_BYTES, note_inflation, read_rows
from dask_pcm.parquet.footers import File
from dask_pcm.parquet.schemas import CommonSchema, is_unnamed_index
from dask_pcm.paths import redacted_repr


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
        """An empty frame with the columns and dtypes of every piece; for the client."""
        # Here: workers need not import Dask's frames, which takes a second.
        from dask.dataframe.utils import clear_known_categories

        table = self._as_read(self.columns).empty_table()
        frame = clear_known_categories(self._to_pandas(table)[list(self.columns)])
        return frame if self.has_own_index else frame.set_axis(pd.RangeIndex(0))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.PieceReader", self.token)


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
        return table.replace_schema_metadata(None)
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
