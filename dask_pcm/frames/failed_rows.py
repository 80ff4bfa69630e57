"""What a row looks like whose function raised: its input columns, nulls, and the reason."""

from __future__ import annotations

from typing import Any

import pandas as pd

from dask_pcm.errors import redacted

#: The column that holds the reason; null for rows that have an answer.
ERROR = "error"
_MAX_ERROR_CHARS = 2_000
#: Kinds of dtypes that have no null: integers and booleans.
_NULLABLE_KINDS = "iub"


def failed_row(frame: pd.DataFrame, meta: pd.DataFrame, error: Exception) -> pd.DataFrame:
    """The output of a failed row: its input columns, nulls for the rest, and the reason.

    Parameters
    ----------
    frame
        The row.
    meta
        Names and dtypes of the output; the caller casts the result to them.
    """
    text = _reason(error)
    row = {
        name: frame[name] if _is_passed(name, dtype, frame) else pd.Series([None], frame.index)
        for name, dtype in meta.dtypes.items()
    }
    row[ERROR] = pd.Series([text], frame.index)
    return pd.DataFrame(row, index=frame.index)


def with_error(result: pd.DataFrame) -> pd.DataFrame:
    """The result with an ``error`` column, null unless the function returned its own."""
    if ERROR not in result.columns:
        result = result.assign(**{ERROR: _no_error(result)})
    return result


def row_wise_meta(meta: pd.DataFrame, given: pd.DataFrame) -> pd.DataFrame:
    """`meta` with an ``error`` column, and with nullable dtypes: a failed row holds nulls.

    Columns that are copied from the input keep their dtype, since a failed row keeps their values.
    """
    changed = {
        name: pd.array([], dtype=dtype).astype(_nullable(dtype)).dtype
        for name, dtype in meta.dtypes.items()
        if getattr(dtype, "kind", "") in _NULLABLE_KINDS and not _is_passed(name, dtype, given)
    }
    meta = meta.astype(changed)
    return meta if ERROR in meta.columns else meta.assign(**{ERROR: _no_error(meta)})


def without_categories(dtype: Any) -> Any:
    """A dtype that can be compared between partitions: categoricals without their categories."""
    return "category" if isinstance(dtype, pd.CategoricalDtype) else dtype


def _is_passed(name: Any, dtype: Any, given: pd.DataFrame) -> bool:
    """Whether an output column has the name and dtype of an input column; failed rows keep it."""
    return name in given.columns and bool(
        without_categories(given[name].dtype) == without_categories(dtype)
    )


def _nullable(dtype: Any) -> str:
    """The name of pandas' nullable counterpart of an integer or boolean dtype."""
    name = str(dtype)
    if name == "bool":
        return "boolean"
    return name.replace("uint", "UInt").replace("int", "Int") if name.islower() else name


def _reason(error: Exception) -> str:
    """The text of the ``error`` column: redacted, truncated and valid UTF-8.

    User exceptions may raise in ``__str__`` or hold lone surrogates, which Parquet cannot store.
    """
    try:
        text = str(error)
    except Exception as broken:
        text = f"(its text is not available: {type(broken).__name__} in __str__)"
    text = redacted(f"{type(error).__name__}: {text}")[:_MAX_ERROR_CHARS]
    return text.encode("utf-8", "backslashreplace").decode()


def _no_error(frame: pd.DataFrame) -> pd.Series:
    """A null for each row of `frame`, as text."""
    return pd.Series([None] * len(frame), index=frame.index, dtype="str")
