"""Files whose types differ: one that holds the values of all, or an error with the way out."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import InputError, SchemaError
from dask_pcm.parquet.arrow_types import canonical, wider
from dask_pcm.runs.identity import identify
from dask_pcm.runs.units.schema import PartSchema
from tests.support.arrow_values import VALUES, shown

TEXT = pa.array(["a", None, "c"])
LISTS = pa.array([["a"], None, []])
NUMBERS = pa.array([1, None, 3])
MOMENTS = pa.array([1, None, 3], pa.timestamp("us"))

SISTERS = {
    "text": (TEXT, TEXT.cast(pa.large_string()), pa.large_string()),
    "text, view": (TEXT, TEXT.cast(pa.string_view()), pa.large_string()),
    "text, categories": (TEXT, TEXT.dictionary_encode(), pa.string()),
    "categories": (
        TEXT.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        pa.array(["x", "y", "a"]).dictionary_encode(),
        pa.dictionary(pa.int32(), pa.string()),
    ),
    "bytes": (pa.array([b"ab"]), pa.array([b"cd"], pa.binary(2)), pa.binary()),
    "integers": (NUMBERS.cast(pa.int8()), NUMBERS, pa.int64()),
    "signs": (NUMBERS.cast(pa.uint16()), NUMBERS.cast(pa.int8()), pa.int32()),
    "large signs": (NUMBERS.cast(pa.uint64()), NUMBERS, pa.int64()),
    "floats": (pa.array([0.5], pa.float16()), pa.array([1.5], pa.float32()), pa.float32()),
    "whole and real": (NUMBERS, pa.array([0.5, None]), pa.float64()),
    "short and real": (NUMBERS.cast(pa.int16()), pa.array([0.5], pa.float32()), pa.float32()),
    "decimals": (
        pa.array([Decimal("1.25")], pa.decimal128(5, 2)),
        pa.array([Decimal("7")], pa.decimal128(20, 0)),
        pa.decimal128(22, 2),
    ),
    "moments": (MOMENTS, MOMENTS.cast(pa.timestamp("ns")), pa.timestamp("ns")),
    "zones": (
        MOMENTS.cast(pa.timestamp("us", "Europe/Prague")),
        MOMENTS.cast(pa.timestamp("us", "America/New_York")),
        pa.timestamp("us", "UTC"),
    ),
    "durations": (pa.array([1], pa.duration("ms")), pa.array([1], pa.duration("ns")), None),
    "times": (pa.array([1], pa.time32("ms")), pa.array([1], pa.time64("us")), pa.time64("us")),
    "lists": (LISTS, LISTS.cast(pa.large_list(pa.large_string())), None),
    "lists of nothing": (pa.array([[], None], pa.list_(pa.null())), LISTS, None),
    "fixed lists": (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), pa.array([[1], []]), None),
    "structs": (
        pa.array([{"a": 1, "b": "x"}], pa.struct([("a", pa.int8()), ("b", pa.string())])),
        pa.array([{"b": "y", "a": 2}], pa.struct([("b", pa.large_string()), ("a", pa.int64())])),
        None,
    ),
    "maps": (
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
        pa.array([[("b", 2)]], pa.map_(pa.string(), pa.int64())),
        None,
    ),
    "nothing": (pa.nulls(2), LISTS, None),
    "extensions": (
        pa.array([b"a" * 16], pa.uuid()),
        pa.array([b"b" * 16], pa.binary(16)),
        pa.binary(16),
    ),
}


def put(folder, *columns, **options):
    """A file for each column, which is called x."""
    folder.mkdir(exist_ok=True)
    for n, column in enumerate(columns):
        table = column if isinstance(column, pa.Table) else pa.table({"x": column})
        pq.write_table(table, folder / f"{n}.parquet", **options)
    return folder


@pytest.mark.parametrize(("a", "b", "kind"), SISTERS.values(), ids=SISTERS)
@pytest.mark.parametrize("is_turned", [False, True])
def test_the_values_of_both_are_read(tmp_path, a, b, kind, is_turned):
    a, b = (b, a) if is_turned else (a, b)
    frame = pcm.read_parquet(put(tmp_path / "in", a, b))
    reader = frame.expr.operand("func")
    assert kind is None or reader.schema.field("x").type == canonical(kind)
    found = frame.compute(scheduler="sync").x
    assert str(found.dtype) == str(frame.x.dtype)
    expected = [v for table in (a, b) for v in table.cast(plain_of(reader)).to_pylist()]
    back = pa.array(found, type=plain_of(reader), from_pandas=True)
    assert str(back.to_pylist()) == str(expected)


def plain_of(reader):
    from dask_pcm.parquet.arrow_types import plain

    return plain(reader.schema.field("x").type)


UNLIKE = {
    "text and numbers": (TEXT, NUMBERS, "'x' is int64 here and string there"),
    "text and bytes": (TEXT, pa.array([b"a"]), "binary here"),
    "truth and numbers": (pa.array([True]), NUMBERS, "int64 here and bool"),
    "dates and moments": (pa.array([dt.date(2020, 1, 1)]), MOMENTS, "timestamp"),
    "zoned and not": (MOMENTS, MOMENTS.cast(pa.timestamp("us", "UTC")), "tz=UTC"),
    "other fields": (pa.array([{"a": 1}]), pa.array([{"a": 1, "b": 2}]), "struct"),
    "within lists": (LISTS, pa.array([[1]]), "list<element: int64> here"),
    "missing": (pa.table({"x": [1], "y": [1]}), NUMBERS, "'y' is missing here and int64 there"),
    "more": (NUMBERS, pa.table({"x": [1], "y": [1]}), "'y' is int64 here and missing there"),
    "beyond 2^53": (pa.array([2**60 + 1]), pa.array([0.5]), "int64, with values from 0 to 11529"),
    "beyond 2^63": (pa.array([2**63], pa.uint64()), NUMBERS, "uint64, with values from 0 to 92"),
    "beyond the unit": (
        pa.array([10**17], pa.timestamp("us")),
        pa.array([1], pa.timestamp("ns")),
        "with values from 0 to 100000000000000000; .* would be timestamp.ns",
    ),
    "within": (pa.array([[2**60]]), pa.array([[0.5]]), "with values of unknown size"),
}


@pytest.mark.parametrize(("a", "b", "said"), UNLIKE.values(), ids=UNLIKE)
def test_what_cannot_be_read_as_one_is_refused_by_file_and_column(tmp_path, a, b, said):
    with pytest.raises(InputError, match=rf"(?s)\.parquet'.*{said}.*columns=") as raised:
        pcm.read_parquet(put(tmp_path / "in", a, b))
    assert "'x'" in str(raised.value) or "'y'" in str(raised.value)


def test_values_of_which_nothing_is_known_are_not_taken_to_fit(tmp_path):
    folder = put(tmp_path / "in", pa.array([1]), pa.array([0.5]), write_statistics=False)
    with pytest.raises(InputError, match="of unknown size"):
        pcm.read_parquet(folder)


def test_only_columns_that_are_asked_for_are_compared(tmp_path):
    one = pa.table({"id": [1], "x": ["a"], "y": [1]})
    two = pa.table({"id": [2], "x": [1]})
    frame = pcm.read_parquet(put(tmp_path / "in", one, two), columns=["id"])
    assert frame.compute(scheduler="sync").id.tolist() == [1, 2]


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_type_is_wide_enough_for_itself_and_for_nothing(name):
    kind = canonical(VALUES[name].type)
    assert canonical(kind) == kind
    for other in (kind, pa.null()):
        assert wider(kind, other) == wider(other, kind) == kind


def test_the_wider_type_does_not_depend_on_the_order():
    kinds = [canonical(array.type) for array in VALUES.values()]
    for a in kinds:
        assert [wider(a, b) for b in kinds] == [wider(b, a) for b in kinds]


def load():
    return "live"


class TestIdentity:
    """What a job is known by does not change with what changes no answer."""

    def digest(self, folder, **options):
        frame = pcm.map_partitions(
            lambda frame, context: frame[["id"]],
            pcm.read_parquet(folder, **options),
            context=pcm.Context(load),
            meta={"id": "i8"},
            batch_rows=2,
        )
        return identify(frame.expr, True).identity["frame"]

    def test_of_a_file_that_is_written_in_other_ways(self, tmp_path):
        first = pa.table({"id": [1, 2], "s": [["a"], []]})
        digest = self.digest(put(tmp_path / "a", first))
        strict = pa.schema(
            [pa.field("id", pa.int64(), nullable=False), ("s", pa.list_(pa.string()))]
        )
        narrow = first.set_column(0, "id", first["id"].cast(pa.int8()))
        for n, table in enumerate((first.cast(strict), narrow)):
            assert self.digest(put(tmp_path / f"b{n}", first, table)) == digest
            assert self.digest(put(tmp_path / f"c{n}", table, first)) == digest

    def test_of_columns_that_are_not_read(self, tmp_path):
        one = pa.table({"id": [1], "x": [1]})
        digest = self.digest(put(tmp_path / "a", one), columns=["id"])
        two = pa.table({"id": [2], "x": ["a"], "y": [2]})
        assert self.digest(put(tmp_path / "b", two, one), columns=["id"]) == digest


def read(folder, **options):
    return pcm.read_parquet(folder, **options).compute(scheduler="sync")


class TestIndexOfPandas:
    BASE = pd.DataFrame({"claim": list("wxyz"), "n": [1, 2, 3, 4]})

    def put(self, folder, *frames):
        for n, frame in enumerate(frames):
            frame.to_parquet(folder / f"{n}.parquet")
        return folder

    def test_one_that_only_some_files_have_is_left_out_if_it_only_counts(self, tmp_path):
        filtered = self.BASE[self.BASE.n != 3]
        for folder, frames in {"a": [filtered, self.BASE], "b": [self.BASE, filtered]}.items():
            (tmp_path / folder).mkdir()
            found = pcm.read_parquet(self.put(tmp_path / folder, *frames))
            assert list(found.columns) == ["claim", "n"] and found.known_divisions
            assert found.compute(scheduler="sync").index.tolist() == list(range(7))

    def test_one_that_all_have_stays(self, tmp_path):
        kept = self.BASE[self.BASE.n != 2]
        found = read(self.put(tmp_path, kept, kept))
        assert found.index.tolist() == [0, 2, 3, 0, 2, 3] and found.index.name is None
        assert list(found.columns) == ["claim", "n"]

    def test_its_type_is_that_of_the_input_in_every_part(self, tmp_path):
        index = pa.array([dt.date(2020, 1, 1), None], pa.date64())
        given = pd.DataFrame({"x": [1, 2]}, index=pd.Index(index.to_pylist(), name="day"))
        given.to_parquet(tmp_path / "a.parquet")
        frame = pcm.read_parquet(tmp_path)
        layout = PartSchema.of(frame._meta, frame.expr.operand("func"))
        found = frame.compute(scheduler="sync")
        parts = [layout.table(part) for part in (found[:1], found[1:], found[:0])]
        assert {part.schema.field("day").type for part in parts} == {pa.date32()}

    def test_texts_without_a_name_that_only_some_have_are_refused(self, tmp_path):
        self.put(tmp_path, self.BASE.set_axis(list("abcd")), self.BASE)
        with pytest.raises(InputError, match=r"0\.parquet' has an unnamed index.*columns="):
            read(tmp_path)
        assert len(read(tmp_path, columns="n")) == 8

    def test_a_named_one_that_is_a_column_elsewhere_is_a_column(self, tmp_path):
        self.put(tmp_path, self.BASE.set_index("claim"), self.BASE)
        assert sorted(read(tmp_path).columns) == ["claim", "n"]

    def test_levels_are_columns(self, tmp_path):
        levels = self.BASE.assign(x=[5, 6, 7, 8]).set_index(["claim", "n"])
        found = read(self.put(tmp_path, levels))
        assert found.to_dict("list") == {"x": [5, 6, 7, 8], **self.BASE.to_dict("list")}

    def test_one_is_a_column_where_it_is_asked_for(self, tmp_path):
        self.put(tmp_path, self.BASE.set_index("claim"))
        assert read(tmp_path, columns=["claim"]).claim.tolist() == list("wxyz")
        assert read(tmp_path, columns=["n"]).index.tolist() == list("wxyz")

    @pytest.mark.parametrize("piece", [1, 2, 100])
    def test_a_named_range_that_is_not_stored_has_its_values(self, tmp_path, piece):
        ids = [pd.RangeIndex(10, 18, 2, name="id"), pd.RangeIndex(0, -4, -1, name="id")]
        self.put(tmp_path, *(self.BASE.set_axis(index) for index in ids))
        found = read(tmp_path, rows_per_piece=piece)
        assert found.index.tolist() == [10, 12, 14, 16, 0, -1, -2, -3]
        assert found.index.name == "id" and list(found.columns) == ["claim", "n"]
        assert read(tmp_path, columns="id").id.tolist() == found.index.tolist()

    def test_a_plain_range_is_the_number_of_the_row(self, tmp_path):
        self.put(tmp_path, self.BASE.set_axis(pd.RangeIndex(10, 18, 2)), self.BASE[1:])
        found = pcm.read_parquet(tmp_path)
        assert found.divisions == (0, 4, 6)

    def test_notes_that_pandas_does_not_understand_are_no_trouble(self, tmp_path):
        tags = pd.Series([["a"], None], dtype=pd.ArrowDtype(pa.list_(pa.string())))
        table = pa.Table.from_pandas(pd.DataFrame({"tags": tags}))
        pq.write_table(table, tmp_path / "a.parquet")
        found = read(tmp_path)
        assert shown(pa.array(found.tags)) == "[['a'], None]"
        broken = table.replace_schema_metadata({"pandas": "no JSON"})
        pq.write_table(broken, tmp_path / "a.parquet")
        assert len(read(tmp_path)) == 2

    def test_types_that_pandas_notes_are_its_own_again(self, tmp_path):
        given = pd.DataFrame(
            {
                "i": pd.array([1, 2], "Int32"),
                "b": pd.array([True, False], "boolean"),
                "a": pd.array([1.5, None], pd.ArrowDtype(pa.float64())),
                "p": pd.period_range("2020", periods=2, freq="M"),
                "z": pd.date_range("2020", periods=2, tz="Europe/Prague"),
                "o": pd.Series(["a", "b"], dtype=object),
            }
        )
        given.to_parquet(tmp_path / "a.parquet")
        found = read(tmp_path).dtypes.astype(str).to_dict()
        assert found == {**given.dtypes.astype(str).to_dict(), "o": "str"}

    def test_a_column_that_is_missing_is_told_as_such(self, tmp_path):
        put(tmp_path, pa.table({"x": [1]}))
        with pytest.raises(SchemaError, match="no column '__index_level_0__'"):
            read(tmp_path, columns=["__index_level_0__"])


def test_categories_that_one_file_has_none_of(tmp_path):
    texts = pa.array(["a", None]).dictionary_encode()
    for number, column in enumerate([pa.nulls(2), texts, texts.slice(1)]):
        pq.write_table(pa.table({"x": column}), tmp_path / f"{number}.parquet")
    found = pcm.read_parquet(tmp_path).compute(scheduler="sync")
    assert found.x.dtype == "category" and found.x.dropna().tolist() == ["a"] and len(found) == 5
