"""What may stand in a prompt, and how it is written there.

| column | in the prompt |
|---|---|
| text | as it is |
| integers | ``42`` |
| floats | the fewest digits that name the number at its own width, with a point: ``3.0``, ``0.1`` |
| booleans | ``True``, ``False`` |
| decimals | all their digits, never an exponent: ``3.50`` |
| dates, times, timestamps | ISO 8601: ``2024-05-01``, ``2024-05-01T12:30:00+02:00`` |
| lists of texts | their texts, one a line |

A null is the row's error. Columns of any other type are refused before anything runs. What a column
of objects holds is looked at row by row.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

#: Stands between the texts of a list.
JOINT = "\n"
_KINDS = "Text, numbers, booleans, decimals, dates, times and lists of texts have one"


class FieldError(ValueError):
    """A value has no form in a prompt; the text says what it is."""


def as_text(value: Any) -> str:
    """How a value is written in a prompt.

    Raises
    ------
    FieldError
        Where it has no form there.

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
    raise FieldError(f"a value of type {name}, which has no form in a prompt. {_KINDS}.")


def _joined(values: Iterable[Any]) -> str:
    texts = list(values)
    if others := [value for value in texts if not isinstance(value, str)]:
        raise FieldError(
            f"a list with {others[0]!r:.40} in it; only lists of texts have a form in a prompt"
        )
    return JOINT.join(texts)


def _iso(value: Any) -> str:
    return value.isoformat()


def _refused(value: Any) -> str:
    raise FieldError(f"a duration ({value}), which has no form in a prompt. {_KINDS}.")


#: The first kind that fits counts: booleans are integers to Python, durations are to numpy.
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


def rows_of(frame: pd.DataFrame, fields: Sequence[str]) -> list[dict[str, str] | str]:
    """The texts of each row's fields, or the row's error."""
    columns = [_cells(frame[name]) for name in fields]
    return [_row(dict(zip(fields, cells, strict=True))) for cells in zip(*columns, strict=True)]


def _row(cells: dict[str, str | FieldError | None]) -> dict[str, str] | str:
    if nulls := [name for name, cell in cells.items() if cell is None]:
        return f"Null in prompt field {', '.join(map(repr, nulls))}."
    for name, cell in cells.items():
        if isinstance(cell, FieldError):
            return f"Prompt field {name!r} holds {cell}"
    return {name: str(cell) for name, cell in cells.items()}


def _cells(series: pd.Series) -> list[str | FieldError | None]:
    return [_cell(value) for value in _values(series)]


def _cell(value: Any) -> str | FieldError | None:
    if value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value))):
        return None
    try:
        return as_text(value)
    except FieldError as error:
        return error


def _values(series: pd.Series) -> Iterable[Any]:
    if isinstance(series.dtype, pd.CategoricalDtype):
        known = [*_values(pd.Series(series.dtype.categories)), None]  # the code of nulls is -1
        return [known[code] for code in series.cat.codes]
    if pd.api.types.is_float_dtype(series.dtype):
        # Python's own floats are wider: 0.1 would have 17 digits.
        width: Any = getattr(series.dtype, "numpy_dtype", series.dtype)
        return list(series.to_numpy(dtype=width, na_value=np.nan))
    return list(series)


def refusal(kind: Any) -> str | None:
    """Why a column of a type cannot stand in a prompt; None where it can.

    Parameters
    ----------
    kind
        Of pandas or Arrow.

    Examples
    --------
    >>> refusal(pa.list_(pa.string())), refusal(np.dtype("int64"))
    (None, None)
    >>> refusal(pa.list_(pa.int64()))
    'is a column of list<item: int64>, which has no form in a prompt'
    """
    if isinstance(kind, pd.ArrowDtype):
        kind = kind.pyarrow_dtype
    is_fit = _arrow_fits(kind) if isinstance(kind, pa.DataType) else _pandas_fits(kind)
    return None if is_fit else f"is a column of {kind}, which has no form in a prompt"


def way_out(name: str) -> str:
    """What to do about a column that is refused."""
    return (
        f"{_KINDS}. Make a text of it first: ddf[{name!r}] = ddf[{name!r}].map(function,"
        f" meta=({name!r}, 'str'))."
    )


def _pandas_fits(kind: Any) -> bool:
    if isinstance(kind, pd.CategoricalDtype):
        return kind.categories is None or _pandas_fits(kind.categories.dtype)
    types = pd.api.types
    is_number = types.is_numeric_dtype(kind) and not types.is_complex_dtype(kind)
    # Objects may be anything: each is looked at when its row is.
    is_text = isinstance(kind, pd.StringDtype) or types.is_object_dtype(kind)
    return is_text or is_number or types.is_bool_dtype(kind) or types.is_datetime64_any_dtype(kind)


def _arrow_fits(kind: pa.DataType) -> bool:
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
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    views = (types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in (*tests, *views))


def _is_arrow_text(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _is_arrow_text(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):  # JSON, for one
        return _is_arrow_text(kind.storage_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
