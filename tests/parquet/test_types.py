"""The value that went in comes out: through frames, functions and outputs, for every type."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal

import dask.dataframe as dd
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import InputError, SchemaError
from dask_pcm.parquet import conversion
from dask_pcm.parquet.conversion import cast, to_arrow, to_pandas
from dask_pcm.parquet.nans import mark, unmark
from dask_pcm.runs.units.schema import PartSchema
from tests.support.arrow_values import NAN, VALUES, shown

#: Types that others do not read, in whatever file they are.
UNREAD = {
    "pandas": {"list of uuid", "list of bytes", "map of maps"},
    "Dask": {"list of uuid", "list of bytes", "map of maps", "tensor", "interval"},
}
#: Types that are stored as another one.
CHANGED = {"text view", "bytes view", "ordered", "list of categories"}


def load():
    return "live"


def passed(frame, context):
    return frame.assign(o=1)


def mapped(path, func=passed, **added):
    meta = {"o": "i8", **added}
    frame = pcm.read_parquet(path)
    return pcm.map_partitions(
        func,
        frame[[name for name in frame.columns if name != "error"]],
        context=pcm.Context(load),
        meta=lambda frame: frame.assign(**{k: pd.Series([], dtype=v) for k, v in meta.items()}),
        batch_rows=2,
    )


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    path = tmp_path_factory.mktemp("every") / "in.parquet"
    pq.write_table(pa.table({"id": range(3), **VALUES}), path)
    return path


def test_every_type_comes_through_a_run_and_is_read_again(client, every, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    pcm.write_parquet(mapped(every), one, progress=False)
    pcm.write_parquet(mapped(one), two, progress=False)
    given = pq.read_table(every)
    for out in (one, two):
        found = pq.read_table(out)
        for name in VALUES:
            assert shown(found[name]) == shown(given[name]), name
            assert name in CHANGED or found[name].type == given[name].type, name
    assert duckdb.sql(f"select * from '{one}/*.parquet'").fetchall()
    for name, read in {"pandas": pd.read_parquet, "Dask": dd.read_parquet}.items():
        (tmp_path / name).mkdir()
        pq.write_table(found.drop_columns(UNREAD[name]), tmp_path / name / "a.parquet")
        assert len(read(tmp_path / name)) == 3


def test_frames_have_the_types_that_they_say(every):
    frame = pcm.read_parquet(every)
    found = frame.compute(scheduler="sync")
    assert found.dtypes.astype(str).to_dict() == frame.dtypes.astype(str).to_dict()


def test_rows_that_fail_and_pieces_of_many_row_groups_change_no_value(tmp_path):
    table = pa.concat_tables([pa.table(VALUES)] * 3)
    table = table.append_column("id", pa.array(range(9)))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=4)

    def fails(frame, context):
        if (frame.id == 4).any():
            raise ValueError("four")
        return frame.assign(o=1)

    frame = mapped(tmp_path / "in.parquet", fails)
    layout = PartSchema.of(frame._meta, pcm.read_parquet(tmp_path).expr.operand("func"))
    found = pa.concat_tables(layout.tables(frame.compute(scheduler="sync")))
    assert found["error"].to_pylist()[4] == "ValueError: four"
    assert found["error"].null_count == 8
    given = pq.read_table(tmp_path / "in.parquet", use_threads=False)
    for name in VALUES:
        assert shown(found[name]) == shown(given[name]), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("list of texts", "a"),
        ("list of floats", np.float32(1.5)),
        ("struct", 1),
        ("map", ("a", 1)),
        ("tensor", np.float32(0)),
        ("uuid", uuid.UUID(bytes=b"a" * 16)),
        ("date", dt.date(1, 1, 1)),
        ("json", '{"a":1}'),
        ("bool8", np.int8(1)),
    ],
)
def test_functions_see_values_of_python_and_numpy(every, name, value):
    cell = pcm.read_parquet(every, columns=[name])[name].compute(scheduler="sync").iloc[0]
    inner = cell["x"] if isinstance(cell, dict) else cell
    inner = inner[0] if isinstance(cell, (list, np.ndarray)) else inner
    assert inner == value and type(inner) is type(value)


def test_embeddings_are_arrays_of_their_type(tmp_path):
    emb = np.arange(12, dtype="f4").reshape(3, 4)
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 4)):
        pq.write_table(pa.table({"emb": pa.array(list(emb), kind)}), tmp_path / "a.parquet")
        found = pcm.read_parquet(tmp_path / "a.parquet").compute(scheduler="sync")
        stacked = np.stack(found.emb)
        assert stacked.dtype == np.float32 and (stacked == emb).all()


DECLARED = {
    "list": (pa.list_(pa.string()), [["a", "b"], None, []]),
    "struct": (
        pa.struct([("x", pa.int64()), ("y", pa.list_(pa.float32()))]),
        [{"x": 1, "y": [0.5]}, None, {"x": None, "y": None}],
    ),
    "map": (pa.map_(pa.string(), pa.int64()), [[("a", 1)], None, []]),
    "maps": (pa.list_(pa.map_(pa.string(), pa.int64())), [[[("a", 1)]], None, []]),
    "decimal": (pa.decimal128(20, 2), [None, None, None]),
    "zoned": (pa.timestamp("us", "UTC"), [None, None, None]),
    "time": (pa.time64("us"), [dt.time(1), None, dt.time(2)]),
    "text": (pa.string(), ["a", None, ""]),
}


def test_outputs_declared_as_arrow_types_are_read_by_everybody(client, tmp_path):
    pq.write_table(pa.table({"id": range(3)}), tmp_path / "in.parquet")

    def answer(frame, context):
        rows = frame["id"].tolist()
        made = {name: [values[row] for row in rows] for name, (_, values) in DECLARED.items()}
        new = {k: pd.Series(v, index=frame.index, dtype=object) for k, v in made.items()}
        return frame.assign(o=1, **new)

    dtypes = {name: pd.ArrowDtype(kind) for name, (kind, _) in DECLARED.items()}
    out = tmp_path / "out"
    pcm.write_parquet(mapped(tmp_path / "in.parquet", answer, **dtypes), out, progress=False)
    found = pq.read_table(out)
    for name, (kind, values) in DECLARED.items():
        assert found[name].to_pylist() == values and found[name].type == kind
    frames = [
        pd.read_parquet(out),
        dd.read_parquet(out).compute(scheduler="sync"),
        pcm.read_parquet(out).compute(scheduler="sync"),
    ]
    assert [frame["list"].notna().tolist() for frame in frames] == [[True, False, True]] * 3
    assert len(duckdb.sql(f"select * from '{out}/*.parquet'").fetchall()) == 3
    pcm.write_parquet(mapped(out), tmp_path / "again", progress=False)
    again = pq.read_table(tmp_path / "again")
    assert again.select(list(DECLARED)).equals(found.select(list(DECLARED)))


class TestNans:
    @pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
    def test_nan_and_null_are_told_apart_through_a_frame(self, kind):
        column = pa.chunked_array([pa.array([1, None, NAN], kind), pa.array([NAN, None], kind)])
        frame = to_pandas(pa.table({"x": column}), {})
        assert frame.x.isna().tolist() == [False, True, True, True, True]
        back = to_arrow(pd.concat([frame, frame.iloc[::-1]]).x, kind)
        assert shown(back) == "[1.0, None, nan, nan, None, None, nan, nan, None, 1.0]"

    def test_they_stay_so_through_casts_and_arithmetic(self):
        x = to_pandas(pa.table({"x": pa.array([1, None, NAN], pa.float32())}), {}).x
        for made in (x.astype("f8") + 1, x.astype("f8").astype("f4"), x.where(x < 2, x)):
            assert shown(to_arrow(made, pa.float64()))[-10:] == "None, nan]"

    def test_a_nan_that_a_function_makes_is_missing_as_pandas_has_it(self):
        assert to_arrow(pd.Series([np.nan, 1.0]), pa.float64()).to_pylist() == [None, 1.0]
        made = pd.Series([[np.nan, 1.0], None, pd.NA], dtype=object)
        assert to_arrow(made, pa.list_(pa.float32())).to_pylist() == [[None, 1.0], None, None]
        made = pd.Series([{"s": np.nan, "x": np.nan}], dtype=object)
        kind = pa.struct([("s", pa.string()), ("x", pa.float64())])
        assert to_arrow(made, kind).to_pylist() == [{"s": None, "x": None}]

    @pytest.mark.parametrize("name", [n for n in VALUES if "f" in str(VALUES[n].type)])
    def test_arrays_that_begin_within_others_are_changed_alike(self, name):
        array = VALUES[name]
        for part in (array, array[1:], array[2:], array[:2], array[:0]):
            assert shown(unmark(mark(part))) == shown(part)


LOSSES = {
    "a fraction": ([1.5], "int64"),
    "a fraction among objects": (pd.Series([1.5, 2], dtype=object), "int64"),
    "too large": ([300], "int8"),
    "a sign": ([-1], "uint64"),
    "beyond 2^63": (pd.Series([2**63], dtype="uint64"), "int64"),
    "beyond 2^53": ([2**60 + 1], "float64"),
    "half a second": (pd.to_datetime(["2020-01-01 00:00:00.5"]), "datetime64[s]"),
    "a text for a truth": (["False"], "bool"),
    "two for a truth": ([2], "bool"),
    "a decimal's fraction": ([Decimal("1.5")], "int64"),
    "a fraction of a decimal beside nothing": ([Decimal("1.5"), None], "Int64"),
    "a moment for a number": (pd.Series([pd.Timestamp(2024, 1, 1)], dtype=object), "int64"),
    "more than a float32": ([1e300], "float32"),
    "more than a float16": (pd.Series([1e6], dtype=object), "float16"),
    "beyond 2^53 among objects": (pd.Series([2**60 + 1, 0.5], dtype=object), "float64"),
    "fractions in a map": ([{"a": 1.5}], pd.ArrowDtype(pa.map_(pa.string(), pa.int64()))),
    "fractions in a list of maps": (
        [[[("a", 1.5)]]],
        pd.ArrowDtype(pa.list_(pa.map_(pa.string(), pa.int64()))),
    ),
    "a field in a map": (
        [{"a": {"x": 1, "y": 2}}],
        pd.ArrowDtype(pa.map_(pa.string(), pa.struct({"x": pa.int64()}))),
    ),
    "nothing for a truth": ([np.nan], "bool"),
    "a list for a text": ([["a"]], "str"),
    "hours of a date": ([dt.datetime(2020, 1, 1, 5)], pd.ArrowDtype(pa.date32())),
    "fractions in a list": ([[1.5]], pd.ArrowDtype(pa.list_(pa.int64()))),
    "a field": ([{"a": 1, "b": 2}], pd.ArrowDtype(pa.struct([("a", pa.int64())]))),
    "a field in a list": (
        [[{"a": 1, "b": 2}]],
        pd.ArrowDtype(pa.list_(pa.struct({"a": pa.int64()}))),
    ),
}


@pytest.mark.parametrize(("values", "dtype"), LOSSES.values(), ids=LOSSES)
def test_a_function_that_returns_more_than_it_declares_is_told(values, dtype):
    column = pd.Series(values)
    column = column.astype(object) if isinstance(dtype, pd.ArrowDtype) else column
    with pytest.raises((TypeError, ValueError)):
        cast(column, pd.api.types.pandas_dtype(dtype))


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1.0, 2.0], "int64", [1, 2]),
        ([1.0, None], "Int64", [1, pd.NA]),
        ([0.1], "float32", [float(np.float32(0.1))]),
        ([2**53], "float64", [2.0**53]),
        (pd.Series([2**60 + 1, None], dtype=object), "Int64", [2**60 + 1, pd.NA]),
        (pd.Series([1, "b"], dtype=object), "str", ["1", "b"]),
        (pd.Series([True, None], dtype=object), "boolean", [True, pd.NA]),
        (pd.Series([Decimal("2"), None]), "Int64", [2, pd.NA]),
        (
            pd.Series([Decimal("0.1"), np.inf, None]),
            "float32",
            [float(np.float32(0.1)), np.inf, np.nan],
        ),
        (pd.Series(["3", 4], dtype=object), "int64", [3, 4]),
        (
            pd.Series([{"a": 1}, [("b", None)], None]),
            pd.ArrowDtype(pa.map_(pa.string(), pa.int64())),
            [[("a", 1)], [("b", None)], pd.NA],
        ),
    ],
)
def test_what_stays_the_same_is_converted(values, dtype, expected):
    assert str(cast(pd.Series(values), pd.api.types.pandas_dtype(dtype)).tolist()) == str(expected)


MISFITS = {
    "a text for a list": (["ab"], pa.list_(pa.string())),
    "a number for a text": ([1], pa.string()),
    "a list for a map": ([["a"]], pa.map_(pa.string(), pa.string())),
    "a number for a category": (pd.Categorical([1]), pa.dictionary(pa.int32(), pa.string())),
    "hours of a date": ([dt.datetime(2020, 1, 1, 5)], pa.date32()),
    "digits of a decimal": ([Decimal("1.234")], pa.decimal128(5, 2)),
    "no uuid": (["x"], pa.uuid()),
    "a shorter tensor": ([np.zeros(3)], VALUES["tensor"].type),
    "a field": ([{"a": 1, "b": 2}], pa.struct([("a", pa.int64())])),
}


@pytest.mark.parametrize(("values", "kind"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_the_type_of_a_part_is_refused(values, kind):
    column = pd.Series(values)
    column = column if isinstance(column.dtype, pd.CategoricalDtype) else column.astype(object)
    with pytest.raises(conversion.MISFITS):
        to_arrow(column, kind)


@pytest.mark.parametrize("values", [["q", "a", None], ["a", "a", "a"], [None, None, None]])
def test_categories_of_any_part_fit(values):
    kind = pa.dictionary(pa.int32(), pa.string(), ordered=True)
    array = to_arrow(pd.Series(pd.Categorical(values)), kind)
    assert array.type == kind and array.to_pylist() == values


def test_the_column_is_named_where_a_function_returns_more_than_it_declares(claims):
    frame = pcm.map_partitions(
        lambda frame, context: frame[["id"]] + 0.5,
        pcm.read_parquet(claims()),
        context=pcm.Context(load),
        meta={"id": "i8"},
    )
    with pytest.raises(SchemaError, match=r"returned 'id' as float64, .* dtype in meta, int64"):
        frame.compute(scheduler="sync")


class TestNames:
    def test_dots_blanks_and_none_at_all(self, tmp_path):
        table = pa.table(
            {
                "a": [{"b": 1, "c": [{"d": 2}]}],
                "a.b": [3],
                "a.c.list.element.d": [4],
                "": [5],
                " ": [6],
                "é'\"\n": [7],
                "0": [8],
                "list": [[9]],
            }
        )
        pq.write_table(table, tmp_path / "a.parquet")
        for name in table.column_names:
            found = pcm.read_parquet(tmp_path, columns=name).compute(scheduler="sync")
            assert found.columns.tolist() == [name]
            assert pa.array(found[name]).to_pylist() == table[name].to_pylist()
        assert pcm.read_parquet(tmp_path).columns.tolist() == table.column_names

    def test_names_that_were_numbers_or_pairs_are_the_texts_they_are_stored_as(self, tmp_path):
        pd.DataFrame({0: [1], 1: [2]}).to_parquet(tmp_path / "a.parquet")
        frame = pcm.read_parquet(tmp_path / "a.parquet")
        assert (
            frame.compute(scheduler="sync").columns.tolist() == frame.columns.tolist() == ["0", "1"]
        )
        pairs = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "x"), ("b", "y")]))
        pairs.to_parquet(tmp_path / "b.parquet")
        frame = pcm.read_parquet(tmp_path / "b.parquet")
        assert frame.compute(scheduler="sync").columns.tolist() == ["('a', 'x')", "('b', 'y')"]

    @pytest.mark.parametrize("name", [0, None, ("a", "b")])
    def test_a_frame_whose_names_are_no_texts_is_not_written(self, client, tmp_path, claims, name):
        frame = pcm.read_parquet(claims())[["id"]].rename(columns={"id": name})
        with pytest.raises(SchemaError, match="named by texts"):
            pcm.write_parquet(frame, tmp_path / "out", progress=False)

    def test_a_name_that_stands_twice_matters_only_where_it_is_read(self, tmp_path):
        table = pa.table([[1], [2], [3]], names=["x", "x", "id"])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(SchemaError, match=r"more than once: x.*columns="):
            pcm.read_parquet(tmp_path)
        found = pcm.read_parquet(tmp_path, columns="id").compute(scheduler="sync")
        assert found.id.tolist() == [3]


class TestRefused:
    def test_fields_of_the_same_name(self, tmp_path):
        column = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
        pq.write_table(pa.table({"id": [1], "x": pa.array([[1]]), "s": column}), tmp_path / "a.pq")
        with pytest.raises(
            SchemaError, match=r"'s' of '.*a\.pq' has struct fields with the same name"
        ):
            pcm.read_parquet(tmp_path)
        assert pcm.read_parquet(tmp_path, columns=["id", "x"]).columns.tolist() == ["id", "x"]

    def test_list_views(self, tmp_path):
        column = pa.array([[1]], pa.list_view(pa.int64()))
        pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
        with pytest.raises(SchemaError, match=r"'x' of '.*a\.parquet' has list views"):
            pcm.read_parquet(tmp_path)

    def test_values_that_python_has_none_for(self, tmp_path):
        column = pa.array([[10**13]], pa.list_(pa.timestamp("s")))
        dates = pa.array([10**7], pa.date32())
        for name, values in {"x": column.cast(pa.list_(pa.timestamp("ms"))), "d": dates}.items():
            pq.write_table(pa.table({name: values}), tmp_path / "a.parquet")
            try:
                pcm.read_parquet(tmp_path).compute(scheduler="sync")
            except InputError as error:
                assert f"Column {name!r} of" in str(error) and "a.parquet" in str(error)

    @pytest.mark.parametrize("dtype", ["complex128", pd.SparseDtype("int64")], ids=str)
    def test_a_dtype_that_parquet_does_not_hold(self, dtype):
        meta = pd.DataFrame({"id": [1], "o": pd.Series([0]).astype(dtype)}).iloc[:0]
        with pytest.raises(SchemaError, match=r"Column 'o' has dtype .*, which Parquet does not"):
            PartSchema.of(meta, None)
