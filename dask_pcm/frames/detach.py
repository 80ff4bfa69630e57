"""A result is made independent of the live object before another task may use that.

Models answer into buffers that they use again: pinned memory, ONNX's bound outputs, the static
tensors of a CUDA graph. A frame that has views of such a buffer would change with the next batch,
which may run before this one is written.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import is_object_dtype

#: What objects of a column are, if they cannot change.
_FIXED = (str, bytes, int, float, complex, type(None))


def detached(result: Any) -> Any:
    """A copy that shares no memory with what the function may write to again.

    Texts are not copied, as they cannot change. What is no DataFrame is returned as it is.
    """
    if not isinstance(result, pd.DataFrame):
        return result
    found = result.copy()  # NumPy's columns; not the objects in columns, nor Arrow's buffers
    for position, dtype in enumerate(found.dtypes):
        if is_object_dtype(dtype):
            found.isetitem(position, _objects(found.iloc[:, position]).array)
        elif isinstance(dtype, pd.ArrowDtype):
            found.isetitem(position, _arrow(found.iloc[:, position]))
    return found


def _objects(column: pd.Series) -> pd.Series:
    values = column.to_numpy()
    if all(isinstance(value, _FIXED) for value in values):
        return column
    copies = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        copies[i] = value if isinstance(value, _FIXED) else _copied(value)
    return pd.Series(copies, index=column.index, name=column.name)


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.copy()
    if hasattr(value, "detach"):  # a tensor: deepcopy refuses one that is part of a graph
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # such as a lock: refused with its column when it is stored
        return value


def _arrow(column: pd.Series) -> pd.arrays.ArrowExtensionArray:
    # copy() shares buffers, which may be those of a NumPy array; and pandas' take() of all rows is
    # a copy().
    values = column.array.__arrow_array__()
    return pd.arrays.ArrowExtensionArray(values.take(pa.array(np.arange(len(column)))))
