"""Object columns are checked by the type that they have in their source, before anything runs.

The expression of a Dask DataFrame is followed down to its source, through steps that leave values
unchanged. A Parquet source has a schema, and a pandas frame in memory has values.
"""

from __future__ import annotations

from typing import Any

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
from dask.dataframe.dask_expr._expr import (
    ArrowStringConversion,
    BlockwiseHead,
    BlockwiseTail,
    Expr,
    Filter,
    Head,
    Partitions,
    Projection,
    Tail,
)
from dask.dataframe.dask_expr.io.io import FromMap, FromPandas
from dask.dataframe.dask_expr.io.parquet import ReadParquet

from dask_pcm.errors import SchemaError
from dask_pcm.inference.fields import FieldError, as_text, refusal, way_out
from dask_pcm.parquet.reader import PieceReader

#: Expressions that leave the values of columns unchanged.
_PASSING = (
    ArrowStringConversion,
    BlockwiseHead,
    BlockwiseTail,
    Filter,
    Head,
    Partitions,
    Projection,
    Tail,
)


def check_fields(ddf: dd.DataFrame, fields: tuple[str, ...]) -> None:
    """Raise SchemaError if a field of a prompt is a column of an unsupported type."""
    origin = _origin(ddf.expr)
    for name in fields:
        problem = refusal(ddf._meta[name].dtype) or _problem_at(origin, ddf._meta[name], name)
        if problem is not None:
            raise SchemaError(f"The prompt's field {name!r} {problem}. {way_out(name)}")


def _origin(expr: Expr) -> Expr:
    """The expression that produces the values."""
    while isinstance(expr, _PASSING):
        expr = expr.frame
    return expr


def _problem_at(origin: Expr, column: pd.Series, name: str) -> str | None:
    """Why a column cannot be written in a prompt, by its source; None if no reason is known."""
    if isinstance(origin, FromPandas):
        return _problem_in(origin.operand("frame")._data, column, name)
    schema = _schema(origin)
    if schema is None or name not in schema.names or not pd.api.types.is_object_dtype(column):
        return None
    return refusal(schema.field(name).type)


def _schema(origin: Expr) -> pa.Schema | None:
    """The Arrow schema of a Parquet source, read by us or by Dask."""
    if isinstance(origin, FromMap) and isinstance(origin.operand("func"), PieceReader):
        return origin.operand("func").schema
    if isinstance(origin, ReadParquet):
        found: Any = origin._dataset_info.get("schema")
        return found if isinstance(found, pa.Schema) else None
    return None


def _problem_in(frame: Any, column: pd.Series, name: str) -> str | None:
    """Why values of a frame in memory cannot be used: Dask converts them to text with ``str``.

    ``from_pandas`` does so with object columns, and its text may differ from ``fields.as_text``.
    """
    if not isinstance(frame, pd.DataFrame) or not pd.api.types.is_object_dtype(frame[name]):
        return None
    if pd.api.types.is_object_dtype(column):
        return None  # Dask leaves the values unchanged: they are checked row by row
    for value in frame[name]:
        if isinstance(value, str) or (pd.api.types.is_scalar(value) and pd.isna(value)):
            continue
        try:
            is_fit = as_text(value) == str(value)
        except FieldError:
            is_fit = False
        if not is_fit:
            return (
                f"holds a {type(value).__name__}, which dask.dataframe.from_pandas converts to the"
                f" text {str(value)!r:.60}"
            )
    return None
