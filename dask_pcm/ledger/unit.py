"""One unit on a worker: ask the ledger, read, infer, commit."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
from dask._task_spec import DataNode, execute_graph

from dask_pcm.context import ContextRef
from dask_pcm.errors import SchemaError
from dask_pcm.ledger.commit import Output
from dask_pcm.ledger.plan import Unit
from dask_pcm.mapping import ERROR
from dask_pcm.pieces import PieceReader
from dask_pcm.plugins.hold import spent


@dataclass(frozen=True, slots=True)
class Layout:
    """How frames become tables: the same columns and types in every part.

    Attributes
    ----------
    schema
        Arrow types of the columns whose types are known beforehand.
    has_index
        Whether the index is stored.
    notes
        What pandas notes in a file's metadata, so that it finds its own types again.
    """

    schema: pa.Schema
    has_index: bool
    notes: Mapping[bytes, bytes]

    @classmethod
    def of(cls, meta: pd.DataFrame, reader: PieceReader | None) -> Layout:
        """From the empty output, and from the reader of our own input, if it is that.

        A column that comes through unchanged keeps the type that it has in the file.

        Raises
        ------
        SchemaError
            Where a column's type cannot be known before it is computed.
        """
        given = None if reader is None else reader.meta()
        own = pa.Schema.from_pandas(meta, preserve_index=False)
        fields = []
        for name, kind in zip(own.names, own.types, strict=True):
            if reader is not None and given is not None and _is_passed(name, given, meta):
                kind = reader.schema.field(name).type
            elif pa.types.is_dictionary(kind):
                kind = pa.dictionary(pa.int32(), kind.value_type)
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
        return cls(pa.schema(fields), has_index, dict(notes))

    def table(self, frame: pd.DataFrame) -> pa.Table:
        """Convert a part.

        Raises
        ------
        SchemaError
            Where a column does not have the type that it has in other parts.
        """
        frame = frame if self.has_index else frame.reset_index(drop=True)
        arrays = [self._array(frame[field.name], field) for field in self.schema]
        columns = pa.Table.from_arrays(arrays, schema=self.schema)
        index = pa.Table.from_pandas(frame[[]], preserve_index=self.has_index)
        for name in index.column_names:
            columns = columns.append_column(name, index.column(name))
        return columns.replace_schema_metadata(self.notes)

    def _array(self, column: pd.Series, field: pa.Field) -> pa.Array:
        try:
            if pd.api.types.is_object_dtype(column.dtype) and not pa.types.is_map(field.type):
                # By what it holds first: told the type, Arrow would drop a time's hours silently.
                found = pa.array(column, from_pandas=True)
                if found.type != field.type and not pa.types.is_null(found.type):
                    _check_fits(found, field.type)
            array = pa.array(column, type=field.type, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise SchemaError(
                f"Column {field.name!r} is {field.type} in the input and in other parts, and what"
                f" it holds now does not fit: {error}. Give the function's column another name."
            ) from error
        return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _check_fits(found: pa.Array, kind: pa.DataType) -> None:
    """Raise ArrowInvalid where values are not the same in another type."""
    fitted = found.cast(kind)
    with contextlib.suppress(pa.ArrowNotImplementedError):
        if not fitted.cast(found.type).equals(found):
            raise pa.ArrowInvalid(f"{found.type} has more to it than {kind}")


def _is_passed(name: str, given: pd.DataFrame, meta: pd.DataFrame) -> bool:
    return name in given.columns and bool(given[name].dtype == meta[name].dtype)


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What the driver learns of a unit.

    Attributes
    ----------
    n_rows, n_failed
        Rows of the part, and those with an error.
    infer_s, total_s
        Seconds that contexts were held, and all.
    is_resumed
        Whether the part was there already.
    errors
        A few of the errors.
    facts
        Where and how the contexts ran: device, dtype.
    """

    name: str
    n_rows: int
    n_failed: int
    infer_s: float = 0.0
    total_s: float = 0.0
    is_resumed: bool = False
    errors: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def run_unit(
    unit: Unit,
    output: Output,
    layout: Layout,
    graph: bytes,
    refs: tuple[ContextRef, ...],
    keys: Sequence[Any],
    inputs: Sequence[Any],
) -> UnitResult:
    """The task of a unit; `refs` tell the gate what it needs.

    The ledger is asked first: a unit whose worker died after it committed comes again.
    """
    start = time.perf_counter()
    if output.has(unit.name):
        note = output.read_note(unit.name)
        return UnitResult(unit.name, note["rows"], note["failed"], is_resumed=True)
    output.note_start(unit.name, unit.n_rows)
    spent.begin()
    tasks, result = pickle.loads(graph)
    tasks.update((key, DataNode(key, value)) for key, value in zip(keys, inputs, strict=True))
    frame = execute_graph(tasks, keys=[result])[result]
    failed = failures(frame)
    note = {"run": output.run, "unit": unit.name, "rows": len(frame), "failed": len(failed)}
    output.commit(unit.name, layout.table(frame), note)
    return UnitResult(
        unit.name,
        len(frame),
        len(failed),
        infer_s=spent.infer_s,
        total_s=time.perf_counter() - start,
        errors=tuple(map(str, failed.head(3))),
        facts=dict(spent.facts),
    )


def failures(frame: pd.DataFrame) -> pd.Series:
    """The errors in a frame."""
    return frame[ERROR].dropna() if ERROR in frame.columns else pd.Series([], dtype="str")
