"""Each type of column has one written form in a prompt, or is refused.

| column | in the prompt |
|---|---|
| text | as it is |
| integers | ``42`` |
| floats | the shortest form that round-trips at the column's width: ``3.0``, ``0.1`` |
| booleans | ``True``, ``False`` |
| decimals | all their digits, never an exponent: ``3.50`` |
| dates, times, timestamps | ISO 8601: ``2024-05-01``, ``2024-05-01T12:30:00+02:00`` |
| lists of texts | their texts, one per line |

A row with a null in a field gets an error. Columns of any other type are refused before anything
runs. Values of object columns are checked row by row.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

#: Separates the texts of a list.
JOINT = "\n"
_KINDS = "Supported are text, numbers, booleans, decimals, dates, times and lists of texts"


class FieldError(ValueError):
    """A value cannot be written in a prompt; the message says what it is."""


def as_text(value: Any) -> str:
    """The form of a value in a prompt.

    Raises
    ------
    FieldError
        If its type is not supported.

    Examples
    --------
    >>> as_text(3), as_text(3.0), as_text(["It rains.", "It pours."])
    ('3', '3.0', 'It rains.\\nIt pours.')
    """
    for kinds, write in _FORMS:
        if isinstance(value, kinds):
            return write(value)
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    raise FieldError(f"a value of type {name}, which cannot be written in a prompt. {_KINDS}.")


def _joined(values: Iterable[Any]) -> str:
    """The texts of a list, one per line; FieldError if an item is not a text."""
    texts = list(values)
    if others := [value for value in texts if not isinstance(value, str)]:
        raise FieldError(
            f"a list that contains {others[0]!r:.40}; only lists of texts can be written in a"
            " prompt"
        )
    return JOINT.join(texts)


def _iso(value: Any) -> str:
    """A date, time or timestamp in ISO 8601."""
    return value.isoformat()


def _refused(value: Any) -> str:
    """Raise FieldError for a duration."""
    raise FieldError(f"a duration ({value}), which cannot be written in a prompt. {_KINDS}.")


#: The first match counts, so subclasses come first: Python's bool is an int, and numpy's
#: timedelta64 is an integer.
_FORMS: Sequence[tuple[Any, Callable[[Any], str]]] = (
    (str, lambda value: str.__str__(value)),
    ((bool, np.bool_), lambda value: str(bool(value))),
    (np.timedelta64, _refused),
    ((int, np.integer), lambda value: str(int(value))),
    (float, float.__repr__),
    (np.floating, str),
    (decimal.Decimal, lambda value: format(value, "f")),
    ((datetime.date, datetime.time), _iso),  # a timestamp is a date to Python
    (np.datetime64, lambda value: pd.Timestamp(value).isoformat()),
    ((list, tuple, np.ndarray), _joined),
)


def rows_as_text(frame: pd.DataFrame, fields: Sequence[str]) -> list[dict[str, str] | str]:
    """For each row its fields as texts, or the row's error."""
    columns = [_cells(frame[name]) for name in fields]
    return [_row(dict(zip(fields, cells, strict=True))) for cells in zip(*columns, strict=True)]


def _row(cells: dict[str, str | FieldError | None]) -> dict[str, str] | str:
    """The fields of one row, or its error if one is null or unsupported."""
    if nulls := [name for name, cell in cells.items() if cell is None]:
        return f"Null in prompt field {', '.join(map(repr, nulls))}."
    for name, cell in cells.items():
        if isinstance(cell, FieldError):
            return f"Prompt field {name!r} holds {cell}"
    return {name: str(cell) for name, cell in cells.items()}


def _cells(series: pd.Series) -> list[str | FieldError | None]:
    """The written form of each value; None for nulls."""
    return [_cell(value) for value in _values(series)]


def _cell(value: Any) -> str | FieldError | None:
    """The written form of one value, None for a null, or its error."""
    if value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value))):
        return None
    try:
        return as_text(value)
    except FieldError as error:
        return error


def _values(series: pd.Series) -> Iterable[Any]:
    """The values of a column, at the column's own width."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        known = [*_values(pd.Series(series.dtype.categories)), None]  # the code of nulls is -1
        return [known[code] for code in series.cat.codes]
    if pd.api.types.is_float_dtype(series.dtype):
        # Iterating over a float32 column yields Python's float64: 0.1 would have 17 digits.
        width: Any = getattr(series.dtype, "numpy_dtype", series.dtype)
        return list(series.to_numpy(dtype=width, na_value=np.nan))
    return list(series)


def refusal(kind: Any) -> str | None:
    """Why a column of a type cannot be written in a prompt; None if it can.

    Parameters
    ----------
    kind
        A pandas dtype or an Arrow type.

    Examples
    --------
    >>> refusal(pa.list_(pa.string())), refusal(np.dtype("int64"))
    (None, None)
    >>> refusal(pa.list_(pa.int64()))
    'is a column of list<item: int64>, which cannot be written in a prompt'
    """
    if isinstance(kind, pd.ArrowDtype):
        kind = kind.pyarrow_dtype
    is_fit = _arrow_fits(kind) if isinstance(kind, pa.DataType) else _pandas_fits(kind)
    return None if is_fit else f"is a column of {kind}, which cannot be written in a prompt"


def way_out(name: str) -> str:
    """What to do about a column that is refused, as a sentence."""
    return (
        f"{_KINDS}. Convert it to text first: ddf[{name!r}] = ddf[{name!r}].map(function,"
        f" meta=({name!r}, 'str'))."
    )


def _pandas_fits(kind: Any) -> bool:
    """Whether columns of a pandas dtype can be written in a prompt."""
    if isinstance(kind, pd.CategoricalDtype):
        return kind.categories is None or _pandas_fits(kind.categories.dtype)
    types = pd.api.types
    is_number = types.is_numeric_dtype(kind) and not types.is_complex_dtype(kind)
    # Object columns may hold anything: values are checked row by row.
    is_text = isinstance(kind, pd.StringDtype) or types.is_object_dtype(kind)
    return is_text or is_number or types.is_bool_dtype(kind) or types.is_datetime64_any_dtype(kind)


def _arrow_fits(kind: pa.DataType) -> bool:
    """Whether columns of an Arrow type can be written in a prompt."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _arrow_fits(kind.value_type)
    if _is_list(kind):
        return _is_arrow_text(kind.value_type)
    scalar = (
        types.is_null,
        types.is_boolean,
        types.is_integer,
        types.is_floating,
        types.is_decimal,
        types.is_date,
        types.is_time,
        types.is_timestamp,
    )
    return _is_arrow_text(kind) or any(test(kind) for test in scalar)


def _is_list(kind: pa.DataType) -> bool:
    """Whether a type is any kind of list."""
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    views = (types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in (*tests, *views))


def _is_arrow_text(kind: pa.DataType) -> bool:
    """Whether a type is text, also as a dictionary or an extension."""
    types = pa.types
    if types.is_dictionary(kind):
        return _is_arrow_text(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):  # such as JSON
        return _is_arrow_text(kind.storage_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
