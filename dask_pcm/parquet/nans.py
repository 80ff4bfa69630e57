"""NaN and null are kept apart in numpy float columns by marking the bits of NaNs that are values.

Arrow distinguishes NaN from null; numpy's floats have only NaN, which pandas also uses for missing
values. A NaN in a file is read as a NaN with a special payload, while a null becomes numpy's
default NaN. The payload survives slicing, concatenation, casts between widths and arithmetic, and
to every function the value is an ordinary NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dask_pcm.parquet.arrow_types import contains, is_extension

#: The payload: the ten highest bits of the fraction. float16 has no more, and casts between widths
#: keep the highest bits.
_MARK = 0b1100101010
_N_MARK_BITS = 10
#: By type: the unsigned integer of the same width, and the number of fraction bits (IEEE 754).
_LAYOUTS = {pa.float16(): ("u2", 10), pa.float32(): ("u4", 23), pa.float64(): ("u8", 52)}


def has_floats(kind: pa.DataType) -> bool:
    """Whether a type is a float or has floats nested in it."""
    return contains(kind, pa.types.is_floating)


def mark(array: pa.Array) -> pa.Array:
    """Mark all NaNs that are values, at any depth."""
    return _change_floats(array, _mark)


def unmark(array: pa.Array) -> pa.Array:
    """Turn unmarked NaNs into nulls and marked NaNs into plain ones, at any depth."""
    return _change_floats(array, _unmark)


def _mark(floats: pa.Array) -> pa.Array:
    """Write the payload into the NaNs of a float array; nulls stay null."""
    is_nan = _is_nan(floats)
    if not is_nan.any():
        return floats
    integer, n_bits = _LAYOUTS[floats.type]
    exponent = np.dtype(integer).itemsize * 8 - 1 - n_bits
    values = floats.fill_null(0).to_numpy(zero_copy_only=False).copy()
    values.view(integer)[is_nan] = (2**exponent - 1 << n_bits) | (_MARK << n_bits - _N_MARK_BITS)
    return _made(values, floats.is_null(), floats.type)


def _unmark(floats: pa.Array) -> pa.Array:
    """The inverse of ``_mark`` on a float array; NaNs without the payload become null."""
    is_nan = _is_nan(floats)
    if not is_nan.any():
        return floats
    integer, n_bits = _LAYOUTS[floats.type]
    values = floats.fill_null(0).to_numpy(zero_copy_only=False).copy()
    fraction = values.view(integer) >> n_bits - _N_MARK_BITS & 2**_N_MARK_BITS - 1
    is_marked = is_nan & (fraction == _MARK)
    values[is_marked] = np.nan
    return _made(values, pc.or_(floats.is_null(), pa.array(is_nan & ~is_marked)), floats.type)


def _is_nan(floats: pa.Array) -> np.ndarray:
    """Which values are NaN; a null is not."""
    return np.asarray(pc.is_nan(floats).fill_null(False))


def _made(values: np.ndarray, is_null: pa.Array, kind: pa.DataType) -> pa.Array:
    """An Arrow array of values and a mask of nulls, NaNs kept."""
    return pa.array(values, kind, mask=np.asarray(is_null), from_pandas=False)


def _change_floats(array: pa.Array, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Apply a change to all float arrays nested in an array, without copying the rest."""
    kind = array.type
    if pa.types.is_floating(kind):
        return change(array)
    if is_extension(kind) or pa.types.is_dictionary(kind) or not has_floats(kind):
        return array
    if array.offset:
        # Buffers and children ignore the offset of a slice: copy, so that it is 0.
        array = pa.concat_arrays([array, array[:0]])
    is_struct = pa.types.is_struct(kind)
    inner = [array.field(i) for i in range(kind.num_fields)] if is_struct else [array.values]
    n_own = 1 if is_struct or pa.types.is_fixed_size_list(kind) else 2  # validity, and offsets
    changed = [_change_floats(values, change) for values in inner]
    own = array.buffers()[:n_own]
    return pa.Array.from_buffers(kind, len(array), own, children=changed)
