"""Rules for Arrow types: the type a column is read as, and the type that holds two others.

All functions are pure and look at types alone, except ``holds``, which also uses the least and
greatest value of a column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

# Registers pandas' period and interval types with Arrow: without it, what a file is read as would
# depend on what else a process has imported.
import pandas.core.arrays.arrow.extension_types  # type: ignore[import-not-found]  # noqa: F401
import pyarrow as pa

Bounds = tuple[int, int]

_INTEGERS: dict[pa.DataType, Bounds] = {
    **{getattr(pa, f"int{n}")(): (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
    **{getattr(pa, f"uint{n}")(): (0, 2**n - 1) for n in (8, 16, 32, 64)},
}
#: Floating point types, narrowest first; each holds all integers up to this magnitude exactly.
_FLOATS = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}
_UNITS = ("s", "ms", "us", "ns")


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list, a large list or a list of fixed size."""
    t = pa.types
    return bool(t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind))


def is_extension(kind: pa.DataType) -> bool:
    """Whether a type is an extension type."""
    return isinstance(kind, pa.BaseExtensionType)


def has_own_storage(kind: pa.DataType) -> bool:
    """Whether a type is an extension that is read as its storage type."""
    return is_extension(kind) and not _is_known(kind)


def canonical(kind: pa.DataType) -> pa.DataType:
    """Normalise a type, so that equal data have equal types, regardless of their writer.

    All fields are nullable and list items have one name. Views become plain text or bytes.
    Category codes have 32 bits. Categories within lists and structs become their values.
    """
    t = pa.types
    if t.is_dictionary(kind):
        return pa.dictionary(pa.int32(), canonical(kind.value_type), kind.ordered)
    if t.is_string_view(kind):
        return pa.large_string()
    if t.is_binary_view(kind):
        return pa.large_binary()
    return _with_children(kind, lambda inner: canonical(_values(inner)))


def plain(kind: pa.DataType) -> pa.DataType:
    """The type that a column is read as: extension types that pandas does not know are removed."""
    if is_extension(kind):
        return plain(kind.storage_type) if has_own_storage(kind) else kind
    return _with_children(kind, _plain_within)


def _plain_within(kind: pa.DataType) -> pa.DataType:
    """The same for a type within another, where no extension types are supported."""
    if is_extension(kind):
        return _plain_within(kind.storage_type)
    if pa.types.is_fixed_size_binary(kind):  # not converted to pandas within lists
        return pa.binary()
    return _with_children(kind, _plain_within)


def _is_known(kind: pa.DataType) -> bool:
    """Whether an extension type has a counterpart in pandas or Python."""
    return kind == pa.uuid() or kind.extension_name.startswith("pandas.")


def _values(kind: pa.DataType) -> pa.DataType:
    """The type of a dictionary's values; any other type as it is."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _with_children(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A nested type with `change` applied to its children, all nullable; others unchanged."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, change(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(change(kind.key_type), change(kind.item_type))
    if is_list(kind):
        item = pa.field("element", change(kind.value_type))
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        return pa.large_list(item) if pa.types.is_large_list(kind) else pa.list_(item)
    return kind


def is_bounded(kind: pa.DataType) -> bool:
    """Whether widening a type can overflow, so that ``holds`` needs the values' bounds."""
    t = pa.types
    return kind in (pa.int64(), pa.uint64()) or bool(t.is_timestamp(kind) or t.is_duration(kind))


def contains(kind: pa.DataType, is_wanted: Callable[[pa.DataType], bool]) -> bool:
    """Whether a predicate is true of a type or of any type nested in it."""
    if is_wanted(kind):
        return True
    if pa.types.is_dictionary(kind):
        return contains(kind.value_type, is_wanted)
    fields = [] if is_extension(kind) else [kind.field(i) for i in range(kind.num_fields)]
    return any(contains(field.type, is_wanted) for field in fields)


def has_categories_within(kind: pa.DataType) -> bool:
    """Whether a type has a dictionary nested in it; a dictionary itself has none."""
    return not pa.types.is_dictionary(kind) and contains(kind, pa.types.is_dictionary)


def wider(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The narrowest type that holds the values of both; None if there is none.

    Both must be canonical. Whether large values fit is decided by ``holds``.

    >>> wider(pa.int8(), pa.uint8()), wider(pa.int64(), pa.float64()), wider(pa.int8(), pa.string())
    (DataType(int16), DataType(double), None)
    """
    if a.equals(b) or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_dictionary(a) or pa.types.is_dictionary(b):
        values = wider(_values(a), _values(b))
        is_both = pa.types.is_dictionary(a) and pa.types.is_dictionary(b)
        return pa.dictionary(pa.int32(), values) if values is not None and is_both else values
    if is_extension(a) or is_extension(b):
        return wider(getattr(a, "storage_type", a), getattr(b, "storage_type", b))
    rules = (_wider_number, _wider_decimal, _wider_text, _wider_time, _wider_nested)
    return next((kind for rule in rules if (kind := rule(a, b)) is not None), None)


def _wider_number(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """For two integers the narrowest that covers both ranges; with a float, an exact float."""
    ranges = [_INTEGERS.get(a), _INTEGERS.get(b)]
    low = min(r[0] for r in ranges if r) if any(ranges) else 0
    high = max(r[1] for r in ranges if r) if any(ranges) else 0
    if all(ranges):
        fitting = [k for k, r in _INTEGERS.items() if r[0] <= low and high <= r[1]]
        return min(fitting, key=lambda k: k.bit_width, default=pa.int64())
    if not all(kind in _FLOATS or kind in _INTEGERS for kind in (a, b)):
        return None
    enough = [k for k, exact in _FLOATS.items() if max(high, -low) <= exact] or [pa.float64()]
    return max(enough[0], *(k for k in (a, b) if k in _FLOATS), key=lambda kind: kind.bit_width)


def _wider_decimal(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """A decimal with the digits of both before and after the point, up to Arrow's 76 in all."""
    if not (pa.types.is_decimal(a) and pa.types.is_decimal(b)):
        return None
    scale = max(a.scale, b.scale)
    digits = max(a.precision - a.scale, b.precision - b.scale) + scale
    if digits > 76:
        return None
    return pa.decimal128(digits, scale) if digits <= 38 else pa.decimal256(digits, scale)


def _wider_text(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Large text for two texts; bytes for two kinds of bytes."""
    t = pa.types
    if all(t.is_string(kind) or t.is_large_string(kind) for kind in (a, b)):
        return pa.large_string()
    is_bytes = [
        t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind)
        for kind in (a, b)
    ]
    is_large = t.is_large_binary(a) or t.is_large_binary(b)
    return (pa.large_binary() if is_large else pa.binary()) if all(is_bytes) else None


def _wider_time(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The finer unit of two dates, times, timestamps or durations."""
    t = pa.types
    if t.is_date(a) and t.is_date(b):
        return pa.date32()
    if a.id != b.id and not (t.is_time(a) and t.is_time(b)):
        return None
    if not (t.is_time(a) or t.is_timestamp(a) or t.is_duration(a)):
        return None
    unit = max(a.unit, b.unit, key=_UNITS.index)
    if t.is_duration(a):
        return pa.duration(unit)
    if t.is_time(a):
        return pa.time64(unit) if unit in ("us", "ns") else pa.time32(unit)
    if (a.tz is None) != (b.tz is None):
        return None
    # A time zone changes how a moment is shown, not the moment.
    return pa.timestamp(unit, a.tz if a.tz == b.tz else "UTC")


def _wider_nested(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Structs with the same field names, maps and lists: wider child by child."""
    t = pa.types
    if t.is_struct(a) and t.is_struct(b):
        theirs = {field.name: field.type for field in b}
        if {field.name for field in a} != theirs.keys():
            return None
        fields = [(field.name, wider(field.type, theirs[field.name])) for field in a]
        return None if any(kind is None for _, kind in fields) else pa.struct(fields)
    if t.is_map(a) and t.is_map(b):
        key, item = wider(a.key_type, b.key_type), wider(a.item_type, b.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if not (is_list(a) and is_list(b)):
        return None
    value = wider(a.value_type, b.value_type)
    if value is None:
        return None
    item = pa.field("element", value)
    sizes = {getattr(kind, "list_size", None) for kind in (a, b)}
    if len(sizes) == 1 and None not in sizes:
        return pa.list_(item, sizes.pop())
    return (
        pa.large_list(item)
        if pa.types.is_large_list(a) or pa.types.is_large_list(b)
        else pa.list_(item)
    )


def holds(kind: pa.DataType, given: pa.DataType, bounds: Bounds | None) -> bool:
    """Whether a wider type `kind` holds all values of type `given` that lie within bounds.

    Without `bounds` (least and greatest value), all values of the type count.
    """
    kind, given = _values(kind), _values(given)
    if given in _INTEGERS:
        room = _FLOATS.get(kind)
        least, most = _INTEGERS[kind] if room is None and kind in _INTEGERS else (0, 0)
        least, most = (-room, room) if room is not None else (least, most)
        low, high = bounds or _INTEGERS[given]
        return least <= low and high <= most
    if pa.types.is_timestamp(given) or pa.types.is_duration(given):
        factor = 1000 ** (_UNITS.index(kind.unit) - _UNITS.index(given.unit))
        low, high = bounds or _INTEGERS[pa.int64()]
        return factor == 1 or max(-low, high) * factor < 2**63
    inner = _inner(kind), _inner(given)
    return all(holds(k, g, None) for k, g in zip(*inner, strict=False))


def _inner(kind: pa.DataType) -> Sequence[pa.DataType]:
    """The types nested directly in a type; those of a struct in the order of their names."""
    if pa.types.is_struct(kind):
        return [field.type for field in sorted(kind, key=lambda field: field.name)]
    if pa.types.is_map(kind):
        return [kind.key_type, kind.item_type]
    return [kind.value_type] if is_list(kind) else []


@functools.lru_cache(maxsize=1024)
def n_leaves(kind: pa.DataType) -> int:
    """Number of physical columns of a type in a Parquet file."""
    if is_extension(kind):
        return n_leaves(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return n_leaves(kind.value_type)
    return sum(n_leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1
