"""Where a column of a frame comes from: what pandas calls an object has a type in its files."""

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
from dask_pcm.parquet.pieces import PieceReader

#: What leaves the values of each column as they are.
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
    """Raise SchemaError where a column cannot stand in a prompt."""
    origin = _origin(ddf.expr)
    for name in fields:
        problem = refusal(ddf._meta[name].dtype) or _problem_at(origin, ddf._meta[name], name)
        if problem is not None:
            raise SchemaError(f"The prompt's field {name!r} {problem}. {way_out(name)}")


def _origin(expr: Expr) -> Expr:
    while isinstance(expr, _PASSING):
        expr = expr.frame
    return expr


def _problem_at(origin: Expr, column: pd.Series, name: str) -> str | None:
    if isinstance(origin, FromPandas):
        return _problem_in(origin.operand("frame")._data, column, name)
    schema = _schema(origin)
    if schema is None or name not in schema.names or not pd.api.types.is_object_dtype(column):
        return None
    return refusal(schema.field(name).type)


def _schema(origin: Expr) -> pa.Schema | None:
    if isinstance(origin, FromMap) and isinstance(origin.operand("func"), PieceReader):
        return origin.operand("func").schema
    if isinstance(origin, ReadParquet):
        found: Any = origin._dataset_info.get("schema")
        return found if isinstance(found, pa.Schema) else None
    return None


def _problem_in(frame: Any, column: pd.Series, name: str) -> str | None:
    """What Dask makes a text of, of a frame in this process, in a way that is none of ours."""
    if not isinstance(frame, pd.DataFrame) or not pd.api.types.is_object_dtype(frame[name]):
        return None
    if pd.api.types.is_object_dtype(column):
        return None  # left as it is: each row is looked at
    for value in frame[name]:
        if isinstance(value, str) or (pd.api.types.is_scalar(value) and pd.isna(value)):
            continue
        try:
            is_fit = as_text(value) == str(value)
        except FieldError:
            is_fit = False
        if not is_fit:
            return (
                f"holds a {type(value).__name__}, of which dask.dataframe.from_pandas makes the"
                f" text {str(value)!r:.60}"
            )
    return None
