"""Filters of ``read_parquet``: by the values of rows, and by the statistics of row groups."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FSSpecHandler, PyFileSystem

from dask_pcm.errors import SchemaError

Filter = tuple[str, str, Any]
Filters = Sequence[Filter] | Sequence[Sequence[Filter]]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda column, values: column.isin(list(values)),
    "not in": lambda column, values: ~column.isin(list(values)),
}


def alternatives(filters: Filters) -> list[list[Filter]]:
    """Normalise filters to a list of alternatives, each a list of conditions that all hold.

    >>> alternatives([("year", ">", 2020), ("lang", "==", "en")])
    [[('year', '>', 2020), ('lang', '==', 'en')]]

    Raises
    ------
    SchemaError
        If they have another form.
    """
    given = list(filters) if isinstance(filters, Iterable) else [filters]
    if all(isinstance(one, tuple) for one in given):
        given = [given]
    found: list[list[Any]] = [list(one) if isinstance(one, Iterable) else [one] for one in given]
    for condition in (condition for one in found for condition in one):
        if not _is_condition(condition):
            raise SchemaError(
                "filters takes conditions such as ('year', '>', 2020), all of which hold, or a list"
                f" of such lists, one of which does; found {condition!r:.80}. The operators are"
                f" {', '.join(_COMPARE)}."
            )
    if not found or not all(found):
        raise SchemaError("filters is empty. Leave it out to read all rows.")
    # Lists are made once: they may be iterators.
    return [[(n, how, list(v) if "in" in how else v) for n, how, v in one] for one in found]


def _is_condition(condition: Any) -> bool:
    if not isinstance(condition, tuple) or len(condition) != 3:
        return False
    name, how, value = condition
    is_list = not isinstance(value, (str, bytes)) and isinstance(value, Iterable)
    is_known = isinstance(name, str) and isinstance(how, str) and how in _COMPARE
    return is_known and is_list == (how in ("in", "not in"))


def filter_columns(filters: Sequence[Sequence[Filter]]) -> list[str]:
    """The columns that filters look at, each once."""
    return list(dict.fromkeys(name for one in filters for name, _, _ in one))


def fitted(filters: Sequence[Sequence[Filter]], schema: pa.Schema) -> list[list[Filter]]:
    """Filters whose values have the types of their columns, so that all comparisons agree.

    Raises
    ------
    SchemaError
        If a column does not exist, or a value is none of its type.
    """
    return [[_fitted(condition, schema) for condition in one] for one in filters]


def _fitted(condition: Filter, schema: pa.Schema) -> Filter:
    name, how, value = condition
    if name not in schema.names:
        raise SchemaError(
            f"filters names {name!r}, which the input does not have; its columns are"
            f" {', '.join(map(repr, schema.names))}."
        )
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    try:
        if how in ("in", "not in"):
            return name, how, [_value(one, kind) for one in value]
        return name, how, _value(value, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise SchemaError(
            f"filters compares column {name!r}, which is {kind}, with {value!r:.80}: {error}."
        ) from error


def _value(value: Any, kind: pa.DataType) -> Any:
    """A value as what a column of this type holds in a frame."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and pa.types.is_integer(kind) and int(value) != value:
        return float(value)  # such as a bound of 2.5: no value of the type equals it
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if not isinstance(value, str):
            raise TypeError("text is compared with text")
        return value
    if pa.types.is_boolean(kind) and not isinstance(value, (bool, np.bool_)):
        raise TypeError("a boolean is compared with True or False")
    return pa.scalar(value).cast(kind).as_py()


def matching(ddf: dd.DataFrame, filters: Sequence[Sequence[Filter]]) -> dd.DataFrame:
    """The rows for which an alternative holds; `filters` are those of ``fitted``."""

    def holds(name: str, how: str, value: Any) -> Any:
        column = ddf[name]
        if isinstance(ddf.dtypes[name], pd.CategoricalDtype):  # they compare by rank, if at all
            column = column.astype(object)
        return _COMPARE[how](column, value) & ~column.isna()

    masks = (functools.reduce(operator.and_, (holds(*each) for each in one)) for one in filters)
    # Masks of nullable columns have nulls where the conditions do not hold.
    return ddf[functools.reduce(operator.or_, masks).fillna(False)]


def matching_groups(fs: Any, path: str, filters: Sequence[Sequence[Filter]]) -> set[int] | None:
    """The row groups that may hold matching rows, by their statistics; None if that is unknown."""
    fragment = ds.ParquetFileFormat().make_fragment(path, PyFileSystem(FSSpecHandler(fs)))
    try:
        wanted = pq.filters_to_expression(fitted(filters, fragment.physical_schema))
        kept = fragment.subset(wanted)
    except (pa.ArrowException, SchemaError):  # such as a type that differs between files
        return None
    return {group.id for group in kept.row_groups}
