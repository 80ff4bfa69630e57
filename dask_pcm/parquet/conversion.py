"""Values survive the round trip from Arrow to pandas and back unchanged, or an error is raised.

The errors name column and type. Only floats may be narrowed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_pcm.parquet.arrow_types import contains, has_own_storage, is_list, plain
from dask_pcm.parquet.nans import has_floats, mark, unmark

#: Exceptions of pandas and Arrow for values that do not fit a type.
MISFITS = (pa.ArrowException, OverflowError, TypeError, ValueError)
#: Pandas' nullable dtypes for Arrow types whose numpy dtype has no null.
NULLABLE = {
    **{getattr(pa, f"int{n}")(): getattr(pd, f"Int{n}Dtype")() for n in (8, 16, 32, 64)},
    **{getattr(pa, f"uint{n}")(): getattr(pd, f"UInt{n}Dtype")() for n in (8, 16, 32, 64)},
    pa.bool_(): pd.BooleanDtype(),
}
#: Arrow types of numpy dtypes without nulls and NaN.
_EXACT = {np.dtype(kind.to_pandas_dtype()): kind for kind in NULLABLE}


def extension_dtypes(schema: pa.Schema, nullable: Iterable[str]) -> dict[str, Any]:
    """Dtypes of the columns for which Arrow's default conversion is not right.

    These are, in this order: the extension dtypes that pandas recorded in the file's metadata,
    nullable dtypes for the columns in `nullable`, and Arrow dtypes for values that Python's types
    cannot hold.
    """
    found = {}
    noted = _noted_dtypes(schema)
    for field in schema:
        kind = plain(field.type)
        if field.name in noted and _is_same(noted[field.name], kind):
            found[field.name] = noted[field.name]
        elif field.name in nullable:
            found[field.name] = NULLABLE[kind]
        elif kind == pa.time64("ns"):  # Python's time has no nanoseconds
            found[field.name] = pd.ArrowDtype(kind)
    return found


def _noted_dtypes(schema: pa.Schema) -> dict[str, Any]:
    """The dtypes in the file's pandas metadata, by column."""
    noted = {}
    for column in pandas_notes(schema).get("columns", ()):
        # Pandas cannot parse every name it writes, and other tools write this metadata too.
        with contextlib.suppress(TypeError, ValueError, KeyError, NotImplementedError):
            noted[column["field_name"]] = pd.api.types.pandas_dtype(column["numpy_type"])
    return noted


def pandas_notes(schema: pa.Schema) -> dict[str, Any]:
    """The pandas metadata of a file; empty if there is none or it is not valid JSON."""
    return _read_notes((schema.metadata or {}).get(b"pandas", b"{}"))


@lru_cache(maxsize=1024)
def _read_notes(notes: bytes) -> dict[str, Any]:
    """Parse pandas metadata; cached, since all files of a dataset often have the same."""
    try:
        found = json.loads(notes)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_same(dtype: Any, kind: pa.DataType) -> bool:
    """Whether a pandas dtype represents all values of an Arrow type."""
    if not hasattr(dtype, "__from_arrow__") or isinstance(
        dtype, (pd.Float32Dtype, pd.Float64Dtype)
    ):
        return False  # masked floats turn NaN into null
    with contextlib.suppress(*MISFITS):
        own = pa.array(pd.Series([], dtype=dtype)).type
        return (_is_text(own) and _is_text(kind)) or bool(own == kind)
    return False


def to_pandas(table: pa.Table, dtypes: Mapping[str, Any]) -> pd.DataFrame:
    """Convert a table; the columns in `dtypes` get those dtypes.

    Lists of numbers become numpy arrays, structs dicts, maps lists of pairs, and dates, times and
    decimals Python objects. NaNs that are values are marked, see ``nans``.
    """
    ordinary = [name for name in table.column_names if name not in dtypes]
    marked = table.select(ordinary)
    for at, name in enumerate(ordinary):
        if has_floats(marked.schema.field(at).type):
            chunks = [mark(chunk) for chunk in marked.column(at).chunks]
            marked = marked.set_column(at, name, pa.chunked_array(chunks, marked.column(at).type))
    frame = marked.to_pandas(integer_object_nulls=True, ignore_metadata=True)
    for name in ordinary:
        if _has_no_categories(frame[name]) and _is_text(table.schema.field(name).type.value_type):
            # Without categories their dtype is object, and Dask does not concatenate that with
            # text categories of other partitions.
            frame[name] = frame[name].cat.set_categories(pd.Index([], dtype="str"))
    for name in table.column_names:
        if name in dtypes:
            frame[name] = dtypes[name].__from_arrow__(table.column(name))
    return frame if len(ordinary) == table.num_columns else frame[table.column_names]


def _has_no_categories(column: pd.Series) -> bool:
    """Whether a column is categorical and its list of categories is empty."""
    return isinstance(column.dtype, pd.CategoricalDtype) and not len(column.dtype.categories)


def _is_text(kind: pa.DataType) -> bool:
    """Whether a type is text, with 32-bit or 64-bit offsets."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def to_arrow(column: pd.Series, kind: pa.DataType) -> pa.Array:
    """Convert a column to an Arrow type, without losing anything of its values.

    Raises
    ------
    pyarrow.ArrowException, OverflowError, TypeError, ValueError
        If a value does not fit the type.
    """
    if (array := _exact(column, kind)) is not None:
        return array
    as_read = plain(kind)
    array = _typed(column, as_read)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if array.type != as_read:
        array = array.cast(as_read)
    if has_floats(as_read) and not _is_extension(column):
        array = unmark(array)
    return array if as_read == kind else array.cast(kind)


def _exact(column: pd.Series, kind: pa.DataType) -> pa.Array | None:
    """A column whose dtype holds just the values of an Arrow type; None for any other.

    Integers and booleans of the type itself, and texts. They need no look at their values, so they
    are converted in microseconds.
    """
    dtype = column.dtype
    if isinstance(dtype, pd.StringDtype):
        if not _is_text(kind):
            return None
        array = pa.array(column.array)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        return array if array.type == kind else array.cast(kind)
    if isinstance(dtype, np.dtype) and _EXACT.get(dtype) == kind:
        return pa.array(column.to_numpy())
    return None


def _typed(column: pd.Series, kind: pa.DataType) -> pa.Array:
    """Convert a column, told the type, as far as Arrow converts by itself; NaNs stay marked."""
    if isinstance(column.dtype, pd.CategoricalDtype) and pa.types.is_dictionary(kind):
        values = pa.array(column.cat.categories.to_series(), type=kind.value_type)
        codes = column.cat.codes.to_numpy()
        indices = pa.array(codes, kind.index_type, mask=codes < 0)
        return pa.DictionaryArray.from_arrays(indices, values, ordered=kind.ordered)
    is_object = bool(column.dtype == object)
    if is_object:
        _check_fits(column, kind)
    if has_floats(kind) and not _is_extension(column):
        values = column.where(column.notna(), None) if is_object else column
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError):  # NaN where a text would be
            return pa.array(values, type=kind, from_pandas=False)
    return pa.array(column, type=kind, from_pandas=True)


def _check_fits(column: pd.Series, kind: pa.DataType) -> None:
    """Raise ArrowInvalid if Arrow, given the type, would silently drop part of a value.

    It does so with the hours of a timestamp, a fraction within a list, or a field of a struct. So
    the column is converted with the type that Arrow infers, then to `kind` and back, and compared.
    Floats may be narrowed.
    """
    if contains(kind, pa.types.is_map):  # Arrow would infer lists or structs for Python's values
        column, kind = column.map(lambda value: _pairs(value, kind)), _without_maps(kind)
    try:
        found = pa.array(column, from_pandas=True)
    except MISFITS:  # Arrow infers no type: there is nothing to compare with
        return
    if found.type == kind or pa.types.is_null(found.type):
        return
    found = found.cast(_narrowed(found.type, kind))
    fitted = found.cast(kind)
    with contextlib.suppress(pa.ArrowNotImplementedError):
        if not fitted.cast(found.type).equals(found):
            raise pa.ArrowInvalid(f"{kind} does not hold all of {found.type}")


def _without_maps(kind: pa.DataType) -> pa.DataType:
    """A type whose maps are replaced by lists of key-value structs; see ``_pairs``."""
    if pa.types.is_map(kind):
        return pa.list_(
            pa.struct([("key", kind.key_type), ("value", _without_maps(kind.item_type))])
        )
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_maps(field.type)) for field in kind])
    return pa.list_(_without_maps(kind.value_type)) if is_list(kind) else kind


def _pairs(value: Any, kind: pa.DataType) -> Any:
    """A value whose maps (dicts or lists of pairs) are replaced by lists of structs."""
    if value is None or value is pd.NA:
        return None
    if pa.types.is_map(kind):
        items = value.items() if isinstance(value, Mapping) else value
        return [{"key": key, "value": _pairs(item, kind.item_type)} for key, item in items]
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        kinds = {field.name: field.type for field in kind}
        return {k: _pairs(v, kinds[k]) if k in kinds else v for k, v in value.items()}
    if is_list(kind) and pd.api.types.is_list_like(value):
        return [_pairs(item, kind.value_type) for item in value]
    return value


def _narrowed(found: pa.DataType, kind: pa.DataType) -> pa.DataType:
    """The type `found` with the float widths of `kind`, at any depth."""
    if pa.types.is_floating(found) and pa.types.is_floating(kind):
        return kind
    if pa.types.is_struct(found) and pa.types.is_struct(kind):
        theirs = {field.name: field.type for field in kind}
        fields = [(f.name, _narrowed(f.type, theirs.get(f.name, f.type))) for f in found]
        return pa.struct(fields)
    if pa.types.is_list(found) and is_list(kind):
        return pa.list_(_narrowed(found.value_type, kind.value_type))
    return found


def cast(column: pd.Series, dtype: Any) -> pd.Series:
    """Convert a column to a declared dtype; floats may be narrowed.

    Raises
    ------
    pyarrow.ArrowException, OverflowError, TypeError, ValueError
        If a value would change.
    """
    if isinstance(dtype, pd.ArrowDtype) and column.dtype == object:
        array = to_arrow(column, dtype.pyarrow_dtype)
        return pd.Series(pd.arrays.ArrowExtensionArray(array), index=column.index)
    is_object = column.dtype == object
    if is_object and isinstance(dtype, pd.StringDtype):
        _check_no_lists(column)
    kind = getattr(dtype, "kind", "")
    if kind == "b" and getattr(column.dtype, "kind", "O") == "O":
        column = column.astype("boolean")  # numpy's bool turns every non-empty text into True
    with np.errstate(invalid="ignore", over="ignore"):
        result = column.astype(dtype)
        if _is_checked(column.dtype, kind) and _differ(column, result):
            raise ValueError(f"{dtype} does not hold all values of this {column.dtype} column")
    if is_object and kind in tuple("iuf"):
        _check_numbers(column, result)
    return result


def _check_numbers(given: pd.Series, result: pd.Series) -> None:
    """Raise ValueError if an object changed its value on becoming a number.

    Texts are exempt: they were parsed. Floats and decimals may be narrowed to a float.
    """
    is_float = result.dtype.kind == "f"
    for value, number in zip(given, result.tolist(), strict=True):
        if isinstance(value, str) or pd.isna(number):
            continue
        if is_float and isinstance(value, (float, np.floating, Decimal)):
            is_same = math.isinf(number) == math.isinf(value)
        else:
            is_same = bool(value == number)
        if not is_same:
            raise ValueError(f"{result.dtype} does not hold {value!r:.80}")


def _check_no_lists(column: pd.Series) -> None:
    """Raise TypeError if a value is list-like: pandas would write its repr as the text."""
    nested = [value for value in column if pd.api.types.is_list_like(value)]
    if nested:
        raise TypeError(f"{nested[0]!r:.80} is not text")


def _is_checked(given: Any, kind: str) -> bool:
    """Whether pandas casts between these dtypes without checking that values stay the same."""
    pairs = {"i": "iufb", "u": "iufb", "f": "iufb", "M": "M", "m": "m"}
    return kind != "" and kind in pairs.get(getattr(given, "kind", ""), "")


def _differ(given: pd.Series, result: pd.Series) -> bool:
    """Whether a cast changed any value, found by casting back."""
    if given.dtype.kind == "f" and result.dtype.kind == "f":  # narrowing is allowed, overflow not
        return bool((np.isinf(result) & ~np.isinf(given)).fillna(False).any())
    back = result.astype(given.dtype)
    is_other = ((back != given) & given.notna()) | (given.isna() & result.notna())
    if given.dtype.kind in "iuf":
        # A value that wrapped around wraps back to itself; only its sign shows it.
        is_other |= (result < 0) != (given < 0)
    return bool(is_other.fillna(False).any())


def readable_notes(notes: Mapping[bytes, bytes], schema: pa.Schema) -> dict[bytes, bytes]:
    """Pandas metadata for a file to write, without dtype names that pandas cannot read back."""
    if b"pandas" not in notes:
        return dict(notes)
    about = json.loads(notes[b"pandas"])
    for column in about["columns"]:
        name = column["field_name"]
        if not _is_understood(column["numpy_type"]) or (
            name in schema.names and has_own_storage(schema.field(name).type)
        ):
            column["numpy_type"] = "object"
    return {**notes, b"pandas": json.dumps(about).encode()}


def _is_understood(name: str) -> bool:
    """Whether pandas can parse the name of a dtype."""
    try:
        pd.api.types.pandas_dtype(name)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def _is_extension(column: pd.Series) -> bool:
    """Whether a column has one of pandas' extension dtypes, which distinguish null from NaN."""
    return isinstance(column.dtype, pd.api.extensions.ExtensionDtype)
