"""What stands in a prompt: by value, by column type, and what is refused where it is asked for."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import zoneinfo

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import SchemaError
from dask_pcm.factcheck import demo_model
from dask_pcm.inference.fields import FieldError, as_text, refusal, rows_as_text
from dask_pcm.inference.origins import check_fields
from dask_pcm.inference.prompts import Template

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


class Colour(str, enum.Enum):  # noqa: UP042 it is what older code has
    RED = "red"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is ", "as it is "),
        (np.str_("numpy's"), "numpy's"),
        (Colour.RED, "red"),
        (3, "3"),
        (np.int64(-3), "-3"),
        (2**63, "9223372036854775808"),
        (3.0, "3.0"),
        (0.1, "0.1"),
        (np.float32(0.1), "0.1"),
        (np.float64(1e16), "1e+16"),
        (float("inf"), "inf"),
        (True, "True"),
        (np.False_, "False"),
        (decimal.Decimal("3.50"), "3.50"),
        (decimal.Decimal("1E+3"), "1000"),
        (dt.date(2024, 5, 1), "2024-05-01"),
        (dt.time(12, 30), "12:30:00"),
        (dt.datetime(2024, 5, 1, 12, tzinfo=BERLIN), "2024-05-01T12:00:00+02:00"),
        (pd.Timestamp("2024-05-01"), "2024-05-01T00:00:00"),
        (np.datetime64("2024-05-01T01:02:03"), "2024-05-01T01:02:03"),
        (["It rains.", "It pours."], "It rains.\nIt pours."),
        (np.array([f"{i}" for i in range(1500)], dtype=object), "\n".join(map(str, range(1500)))),
        ([], ""),
    ],
)
def test_each_kind_of_value_has_one_form(value, text):
    assert as_text(value) == text
    assert Template("<{x}>").fill({"x": value}) == f"<{text}>"


OTHERS = ({"a": 1}, b"bytes", [1, 2], ["a", None], [["a"]], {"a"}, object(), 1j)
OTHERS += (np.timedelta64(1, "s"), dt.timedelta(1), np.array([[1]]), pd.Interval(0, 1))


@pytest.mark.parametrize("value", OTHERS)
def test_other_values_have_none(value):
    with pytest.raises(FieldError, match="in a prompt"):
        as_text(value)


def arrow(value, kind):
    return pd.array([value, None], dtype=pd.ArrowDtype(kind))


FORMS = {
    "arrow float": (arrow(0.1, pa.float32()), "0.1"),
    "numpy float": (np.array([0.1, np.nan], dtype="f4"), "0.1"),
    "nullable float": (pd.array([0.1, None], dtype="Float32"), "0.1"),
    "nullable integer": (pd.array([2**53 + 1, None], dtype="Int64"), "9007199254740993"),
    "arrow text": (arrow("a", pa.large_string()), "a"),
    "arrow list": (arrow(["a", "b"], pa.list_(pa.string())), "a\nb"),
    "arrow date": (arrow(dt.date(2024, 5, 1), pa.date32()), "2024-05-01"),
    "arrow decimal": (arrow(decimal.Decimal("1.50"), pa.decimal128(9, 2)), "1.50"),
    "time": (pd.to_datetime(["2024-05-01", None]), "2024-05-01T00:00:00"),
    "category": (pd.Categorical(["a", None]), "a"),
    "category of numbers": (pd.Categorical([3, None]), "3"),
    "objects": (np.array([True, None], dtype=object), "True"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_each_kind_of_column_has_that_form_and_nulls(kind):
    values, text = FORMS[kind]
    frame = pd.DataFrame({"x": values})
    assert refusal(frame.x.dtype) is None
    assert rows_as_text(frame, ("x",)) == [{"x": text}, "Null in prompt field 'x'."]


def test_what_a_row_cannot_say_is_the_rows_error():
    frame = pd.DataFrame({"x": pd.Series([{"a": 1}, "fine", [1]], dtype=object)})
    bad, fine, numbers = rows_as_text(frame, ("x",))
    assert fine == {"x": "fine"}
    assert bad.startswith("Prompt field 'x' holds a value of type dict, which cannot be written")
    assert numbers.startswith("Prompt field 'x' holds a list that contains 1")


COLUMNS = {
    "struct": pa.array([{"a": 1}]),
    "numbers": pa.array([[1, 2]]),
    "nested": pa.array([[["a"]]]),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "bytes": pa.array([b"a"]),
    "duration": pa.array([1], pa.duration("s")),
}


class TestRefusedOnTheClient:
    @pytest.fixture
    def folder(self, tmp_path):
        table = pa.table({"text": ["a"], "texts": [["a"]], **COLUMNS})
        pq.write_table(table, tmp_path / "a.parquet")
        return str(tmp_path)

    @pytest.mark.parametrize("name", COLUMNS)
    @pytest.mark.parametrize("read", [pcm.read_parquet, dd.read_parquet])
    def test_by_the_type_in_the_files(self, folder, name, read):
        ddf = read(folder)
        for frame in (ddf, ddf[["text", name]], ddf[ddf.text == "a"]):
            with pytest.raises(SchemaError, match=rf"'{name}' is a column of .*cannot.*\.map\("):
                check_fields(frame, (name,))
        check_fields(ddf, ("text", "texts"))

    def test_by_classify(self, folder):
        with pytest.raises(SchemaError, match=r"'struct' is a column of struct<a: int64>"):
            pcm.classify(
                pcm.read_parquet(folder), demo_model(), prompt="{struct}", choices=["a", "b"]
            )

    @pytest.mark.parametrize("kind", ["complex128", "timedelta64[ns]", "period[D]"])
    def test_by_the_type_in_pandas(self, kind):
        frame = pd.DataFrame({"x": pd.Series([], dtype=kind)})
        with pytest.raises(SchemaError, match="'x' is a column of"):
            check_fields(dd.from_pandas(frame, npartitions=1), ("x",))

    def test_lists_of_which_dask_has_made_texts(self):
        frame = pd.DataFrame({"x": pd.Series([None, ["a", "b"]], dtype=object)})
        with pytest.raises(SchemaError, match=r"'x' holds a list, which .*from_pandas converts"):
            check_fields(dd.from_pandas(frame, npartitions=1), ("x",))
        with dask.config.set({"dataframe.convert-string": False}):
            check_fields(dd.from_pandas(frame, npartitions=1), ("x",))  # each row is looked at

    def test_not_what_a_function_has_made_of_it(self, folder):
        ddf = pcm.read_parquet(folder)
        ddf["struct"] = ddf.struct.map(str, meta=("struct", "str"))
        check_fields(ddf, ("struct",))
