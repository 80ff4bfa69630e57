"""A column of each type that a Parquet file can have, with the values that get lost easily."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa

NAN = float("nan")
MAP = pa.map_(pa.string(), pa.int64())


def _column(values, kind):
    return pa.array(values, kind)


def _integers():
    for n in (8, 16, 32, 64):
        for kind, last in ((f"int{n}", 2 ** (n - 1) - 1), (f"uint{n}", 2**n - 1)):
            yield kind, _column([1, 3, last], getattr(pa, kind)())
            yield f"{kind} with null", _column([1, None, last], getattr(pa, kind)())


def _times():
    for unit in ("s", "ms", "us", "ns"):
        yield f"duration {unit}", _column([1, None, 2**40], pa.duration(unit))
        for zone in (None, "UTC", "Europe/Prague", "+03:00"):
            yield f"timestamp {unit} {zone}", _column([1, None, 2**40], pa.timestamp(unit, zone))
    yield "time s", _column([1, None, 3], pa.time32("s"))
    yield "time ms", _column([1, None, 3], pa.time32("ms"))
    yield "time us", _column([1, None, 3], pa.time64("us"))
    yield "time ns", _column([1, None, 3], pa.time64("ns"))
    yield "date", _column([dt.date(1, 1, 1), None, dt.date(9999, 1, 1)], pa.date32())
    yield "date64", _column([86_400_000, None, 0], pa.date64())
    yield "a year beyond Python's", _column([10**13, None, 1], pa.timestamp("ms"))


VALUES: dict[str, pa.Array] = {
    **dict(_integers()),
    **dict(_times()),
    **{f"float{n}": _column([1.5, None, NAN], getattr(pa, f"float{n}")()) for n in (16, 32, 64)},
    "decimal128": _column([Decimal("1.20"), None, Decimal("3")], pa.decimal128(20, 2)),
    "decimal256": _column([Decimal("1.2"), None, Decimal(10) ** 50], pa.decimal256(60, 5)),
    "bool": _column([True, False, True], None),
    "bool with null": _column([True, None, False], None),
    "text": _column(["a", None, ""], pa.string()),
    "large text": _column(["a", None, ""], pa.large_string()),
    "text view": _column(["a", None, "b" * 20], pa.string_view()),
    "bytes": _column([b"\xff", None, b""], pa.binary()),
    "large bytes": _column([b"\xff", None, b""], pa.large_binary()),
    "fixed bytes": _column([b"ab", None, b"cd"], pa.binary(2)),
    "bytes view": _column([b"\xff", None, b""], pa.binary_view()),
    "categories": _column(["a", None, "b"], None).dictionary_encode(),
    "ordered": pa.DictionaryArray.from_arrays(
        _column([1, None, 0], pa.int8()), ["z", "a"], ordered=True
    ),
    "list of integers": _column([[1, None, 2**60 + 1], None, []], pa.list_(pa.int64())),
    "list of large ones": _column([[2**64 - 1, None], None, []], pa.list_(pa.uint64())),
    "list of floats": _column([[1.5, None, NAN], None, []], pa.list_(pa.float32())),
    "list of halves": _column([[1.5, None, NAN], None, []], pa.list_(pa.float16())),
    "list of bool": _column([[True, None], None, []], None),
    "list of texts": _column([["a", None], None, []], None),
    "list of bytes": _column([[b"ab", None], None, []], pa.list_(pa.binary(2))),
    "list of moments": _column([[1, None], None, []], pa.list_(pa.timestamp("ns", "UTC"))),
    "list of durations": _column([[1, None], None, []], pa.list_(pa.duration("ns"))),
    "list of decimals": _column([[Decimal("1.20"), None], None, []], None),
    "list of lists": _column([[[dt.date(2020, 1, 1), None], None], None, []], None),
    "list of categories": pa.ListArray.from_arrays(
        [0, 1, 1, 2], pa.array(["a", "b"]).dictionary_encode()
    ),
    "list of nothing": _column([[None], None, []], pa.list_(pa.null())),
    "large list": _column([[1], None, []], pa.large_list(pa.int32())),
    "fixed list": _column([[1.0, NAN], None, [None, 2.0]], pa.list_(pa.float32(), 2)),
    "struct": _column([{"x": 1, "y": NAN, "z": ["a"]}, None, {"x": None}], None),
    "struct, deep": _column([{"s": "a", "f": [{"g": NAN}, {"g": None}]}, None, {"s": None}], None),
    "struct of map": _column([{"m": [("a", 1)]}, None, {"m": None}], pa.struct([("m", MAP)])),
    "list of maps": _column([[[("a", 1)], None], None, []], pa.list_(MAP)),
    "map": _column([[("a", 1), ("b", None)], None, []], MAP),
    "map of maps": _column([[("a", [("c", 1)])], None, []], pa.map_(pa.string(), MAP)),
    "map of floats": _column([[("a", NAN), ("b", None)], None, []], pa.map_("string", "double")),
    "nothing": pa.nulls(3),
    "uuid": _column([b"a" * 16, None, b"b" * 16], pa.uuid()),
    "list of uuid": pa.ListArray.from_arrays(
        [0, 1, 1, 2], pa.array([b"a" * 16, b"b" * 16], pa.uuid())
    ),
    "json": _column(['{"a":1}', None, "2"], pa.json_()),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), _column([1, None, 0], pa.int8())),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(
        np.arange(12, dtype="f4").reshape(3, 2, 2)
    ),
    "period": _column(pd.Series(pd.period_range("2020", periods=3, freq="M")), None),
    "interval": _column(pd.Series(pd.interval_range(0, 3)), None),
}


def shown(column: pa.ChunkedArray | pa.Array) -> str:
    """Values in which NaN is NaN, and null is null."""
    try:
        return str(column.to_pylist())
    except (OverflowError, ValueError):  # beyond what Python has
        return str(column.cast(pa.int64()).to_pylist())
