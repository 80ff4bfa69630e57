"""The schema of parts: every part of an output has the same columns and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_pcm.errors import SchemaError
from dask_pcm.frames.failed_rows import ERROR
from dask_pcm.parquet.arrow_types import canonical
from dask_pcm.parquet.conversion import MISFITS, readable_notes, to_arrow
from dask_pcm.parquet.reader import PieceReader

#: Bytes of a row group of a part: what is converted and encoded at a time.
GROUP_BYTES = 32 << 20
_N_SAMPLED = 16
Cast = Callable[[pd.Series], pd.Series]
#: Rows that are converted at once, however large they are: they are in memory already.
_N_SMALL = 64


@dataclass(frozen=True, slots=True)
class PartSchema:
    """Converts frames to tables with the same columns and types in every part.

    Attributes
    ----------
    schema
        Columns and their Arrow types.
    has_index
        Whether the index is stored.
    index
        Arrow type of an index that comes from the input; None for pandas' own type.
    notes
        The metadata from which pandas restores its own types.
    """

    schema: pa.Schema
    has_index: bool
    index: pa.DataType | None
    notes: Mapping[bytes, bytes]

    @classmethod
    def of(cls, meta: pd.DataFrame, reader: PieceReader | None) -> PartSchema:
        """From the output's `meta`, and from the reader of the input, if it is ours.

        A column of the input that is passed through keeps its type in the file.

        Raises
        ------
        SchemaError
            A column's type cannot be known before it is computed.
        """
        given = None if reader is None else reader.meta()
        own = _own_types(meta)
        fields = []
        for name, kind in zip(own.names, own.types, strict=True):
            if reader is not None and given is not None and _is_passed(name, given, meta):
                kind = reader.schema.field(name).type
            elif pa.types.is_dictionary(kind):
                kind = canonical(kind)
            elif pa.types.is_null(kind):
                raise SchemaError(
                    f"Column {name!r} has dtype {meta[name].dtype}, which says nothing of what it"
                    " will hold, so its parts could not be stored alike. Declare it in meta, for"
                    f" instance {name}=pandas.ArrowDtype(pyarrow.list_(pyarrow.string()))."
                )
            fields.append(pa.field(name, kind))
        is_counted = reader is not None and not reader.has_own_index  # our own row numbers
        has_index = meta.index.name is not None or not (
            is_counted or isinstance(meta.index, pd.RangeIndex)
        )
        notes = pa.Schema.from_pandas(meta, preserve_index=has_index).metadata or {}
        schema = pa.schema(fields)
        return cls(schema, has_index, _index_type(meta, reader), readable_notes(notes, schema))

    def tables(self, frame: pd.DataFrame, cast: Cast | None = None) -> Iterator[pa.Table]:
        """Convert a frame to tables of a row group each; at least one.

        `cast` is called with each column before it is converted.

        Raises
        ------
        SchemaError
            A column does not fit its type.
        """
        if len(frame) <= _N_SMALL:
            yield self.table(frame, cast)
            return
        sampled = np.linspace(0, len(frame) - 1, _N_SAMPLED, dtype=int)
        row_bytes = self.table(frame.iloc[sampled], cast).nbytes / _N_SAMPLED
        n_rows = max(1, int(GROUP_BYTES / max(1.0, row_bytes)))
        for start in range(0, len(frame), n_rows):
            yield self.table(frame.iloc[start : start + n_rows], cast)

    def table(self, frame: pd.DataFrame, cast: Cast | None = None) -> pa.Table:
        """Convert a frame to one table; a column ``error`` that it lacks is null."""
        self._check(frame)
        arrays = [
            pa.nulls(len(frame), field.type)
            if field.name == ERROR and ERROR not in frame.columns
            else self._array(frame[field.name] if cast is None else cast(frame[field.name]), field)
            for field in self.schema
        ]
        if not self.has_index:
            return pa.Table.from_arrays(arrays, schema=self._noted)
        index = pa.Table.from_pandas(frame[[]], preserve_index=True)
        columns = pa.Table.from_arrays(arrays, schema=self.schema)
        for name in index.column_names:
            column = index.column(name)
            if self.index is not None:
                field = pa.field(name, self.index)
                column = self._array(frame.index.to_series(), field)
            columns = columns.append_column(name, column)
        return columns.replace_schema_metadata(self.notes)

    def _check(self, frame: pd.DataFrame) -> None:
        """Raise SchemaError if columns are missing, or would be lost."""
        if not isinstance(frame, pd.DataFrame):
            raise SchemaError(f"A partition is a {type(frame).__name__}; meta says a DataFrame.")
        found, wanted = frame.columns.tolist(), self.schema.names
        if found == wanted or set(wanted) - {ERROR} == set(found) - {ERROR}:
            return
        raise SchemaError(
            f"A partition has columns {found}, but meta says {wanted}. Give the function whose"
            " result this is the meta that fits, or have it return these columns."
        )

    @property
    def _noted(self) -> pa.Schema:
        return self.schema.with_metadata(self.notes)

    def _array(self, column: pd.Series, field: pa.Field) -> pa.Array:
        try:
            return to_arrow(column, field.type)
        except MISFITS as error:
            raise SchemaError(
                f"Column {field.name!r} is {field.type} in the input and in other parts, and what"
                f" it holds now does not fit: {error}. Give the function's column another name."
            ) from error


def _own_types(meta: pd.DataFrame) -> pa.Schema:
    """Arrow types of the columns, from their dtypes."""
    try:
        return pa.Schema.from_pandas(meta, preserve_index=False)
    except MISFITS:
        for name in meta.columns:
            try:
                pa.Schema.from_pandas(meta[[name]], preserve_index=False)
            except MISFITS as error:
                raise SchemaError(
                    f"Column {name!r} has dtype {meta[name].dtype}, which Parquet does not hold"
                    f" ({error}). Convert it in the function, and declare what it is then in meta."
                ) from error
        raise


def _index_type(meta: pd.DataFrame, reader: PieceReader | None) -> pa.DataType | None:
    """The type of the input's index, if the output has that index; else None."""
    if reader is None or reader.index is None:
        return None
    given = reader.meta().index
    is_same = given.name == meta.index.name and given.dtype == meta.index.dtype
    return reader.schema.field(reader.index).type if is_same else None


def _is_passed(name: str, given: pd.DataFrame, meta: pd.DataFrame) -> bool:
    return name in given.columns and bool(given[name].dtype == meta[name].dtype)
