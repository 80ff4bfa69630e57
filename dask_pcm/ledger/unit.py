"""One unit on a worker: ask the ledger, read, infer, commit."""

from __future__ import annotations

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
from dask_pcm.plugins.worker import spent


@dataclass(frozen=True, slots=True)
class Layout:
    """How frames become tables: the same columns and types in every part.

    Attributes
    ----------
    schema
        Arrow types of the columns whose types are known beforehand.
    has_index
        Whether the index is stored.
    """

    schema: pa.Schema
    has_index: bool

    @classmethod
    def of(cls, meta: pd.DataFrame, given: pd.DataFrame | None, types: pa.Schema | None) -> Layout:
        """From the empty output, and from the input (empty frame and Arrow types) if known.

        A column that comes through unchanged keeps the type that it has in the file.
        """
        own = pa.Schema.from_pandas(meta, preserve_index=False)
        fields = []
        for name, kind in zip(own.names, own.types, strict=True):
            is_passed = (
                given is not None
                and name in given.columns
                and given[name].dtype == meta[name].dtype
            )
            if is_passed and types is not None:
                fields.append(pa.field(name, types.field(name).type))
            elif not pa.types.is_null(kind):
                fields.append(pa.field(name, kind))
        is_plain = meta.index.name is None and pd.api.types.is_integer_dtype(meta.index.dtype)
        return cls(pa.schema(fields), not is_plain)

    def table(self, frame: pd.DataFrame) -> pa.Table:
        """Convert a part.

        Raises
        ------
        SchemaError
            Where a column does not have the type that it has in other parts.
        """
        frame = frame if self.has_index else frame.reset_index(drop=True)
        inferred = pa.Schema.from_pandas(frame, preserve_index=self.has_index)
        fields = [
            pa.field(field.name, self._type(field)).with_metadata(field.metadata)
            for field in inferred
        ]
        schema = pa.schema(fields, metadata=inferred.metadata)
        try:
            return pa.Table.from_pandas(frame, schema=schema, preserve_index=self.has_index)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise SchemaError(f"A part cannot be stored as the others are: {error}") from error

    def _type(self, field: pa.Field) -> pa.DataType:
        index = self.schema.get_field_index(field.name)
        if index >= 0:
            return self.schema.field(index).type
        return pa.string() if pa.types.is_null(field.type) else field.type


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
