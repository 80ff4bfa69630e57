"""Filters of ``read_parquet``: by the values of rows, and by the statistics of row groups."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import dask.dataframe as dd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from dask.dataframe.utils import meta_nonempty
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
    return found


def _is_condition(condition: Any) -> bool:
    if not isinstance(condition, tuple) or len(condition) != 3:
        return False
    name, how, value = condition
    is_list = not isinstance(value, (str, bytes)) and isinstance(value, Iterable)
    return isinstance(name, str) and how in _COMPARE and is_list == (how in ("in", "not in"))


def filter_columns(filters: Sequence[Sequence[Filter]]) -> list[str]:
    """The columns that filters look at, each once."""
    return list(dict.fromkeys(name for one in filters for name, _, _ in one))


def matching(ddf: dd.DataFrame, filters: Sequence[Sequence[Filter]]) -> dd.DataFrame:
    """The rows for which an alternative holds; a condition on a null does not hold.

    Raises
    ------
    SchemaError
        If a value cannot be compared with its column.
    """
    sample = meta_nonempty(ddf._meta)
    for name, how, value in (condition for one in filters for condition in one):
        try:
            _COMPARE[how](sample[name], value)
        except TypeError as error:
            raise SchemaError(
                f"filters compares column {name!r}, which is {ddf.dtypes[name]}, with"
                f" {value!r:.80}: {error}."
            ) from error
    masks = (
        functools.reduce(
            operator.and_,
            (_COMPARE[how](ddf[name], value) & ~ddf[name].isna() for name, how, value in one),
        )
        for one in filters
    )
    # Masks of nullable columns have nulls where the conditions do not hold.
    return ddf[functools.reduce(operator.or_, masks).fillna(False)]


def matching_groups(fs: Any, path: str, filters: Sequence[Sequence[Filter]]) -> set[int] | None:
    """The row groups that may hold matching rows, by their statistics; None if that is unknown."""
    fragment = ds.ParquetFileFormat().make_fragment(path, PyFileSystem(FSSpecHandler(fs)))
    try:
        kept = fragment.subset(_expression(filters))
    except pa.ArrowException:  # for instance a column whose type differs between files
        return None
    return {group.id for group in kept.row_groups}


def _expression(filters: Sequence[Sequence[Filter]]) -> pc.Expression:
    plain = [[(n, h, list(v) if "in" in h else v) for n, h, v in one] for one in filters]
    return pq.filters_to_expression(plain)
