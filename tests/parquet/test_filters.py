"""``filters`` and ``storage_options`` of ``read_parquet``."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import SchemaError
from dask_pcm.parquet import cursors
from tests.support.jobs import LLM, write

N_ROWS, GROUP_ROWS = 100, 10
COLUMNS = {
    "number": pa.array([*range(N_ROWS - 1), None], pa.int64()),
    "plain": pa.array(range(N_ROWS), pa.int32()),
    "share": pa.array([None if i % 7 == 0 else i / 4 for i in range(N_ROWS)], pa.float64()),
    "lang": pa.array([None if i % 5 == 0 else ["en", "de"][i % 2] for i in range(N_ROWS)]),
    "is_new": pa.array([None if i % 11 == 0 else i > 50 for i in range(N_ROWS)]),
    "at": pa.array([datetime.datetime(2026, 1, 1) + datetime.timedelta(i) for i in range(N_ROWS)]),
}
FILTERS = [
    [("number", ">", 40)],
    [("number", ">=", 40), ("number", "<", 45)],
    [[("plain", "==", 3)], [("plain", "=", 77), ("lang", "!=", "en")], [("share", "<=", 2.0)]],
    [("lang", "==", "de")],
    [("lang", "in", ["de", "fr"]), ("plain", "not in", {1, 3, 5})],
    [("number", "!=", 5)],
    [("share", ">", 20.0)],
    [("is_new", "==", True)],
    [("at", ">=", pd.Timestamp("2026-03-20"))],
    [("plain", ">", 1_000)],
]


@pytest.fixture
def folder(tmp_path):
    table, path = pa.table(COLUMNS), tmp_path / "rows"
    path.mkdir()
    for number, start in enumerate(range(0, N_ROWS, N_ROWS // 2)):
        rows = table.slice(start, N_ROWS // 2)
        pq.write_table(rows, path / f"{number}.parquet", row_group_size=GROUP_ROWS)
    return str(path)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_rows_are_those_that_pandas_reads(folder, filters):
    expected = pd.read_parquet(folder, filters=filters)
    found = pcm.read_parquet(folder, filters=filters, rows_per_piece=7).compute(scheduler="sync")
    assert found["plain"].tolist() == expected["plain"].tolist()
    assert found.columns.tolist() == expected.columns.tolist()
    # Indexed by row number in the whole input, as without filters.
    assert found.index.tolist() == expected["plain"].tolist()


OTHERS = {
    "decimal": ([Decimal(i) / 4 for i in range(20)], Decimal("2.5")),
    "day": ([datetime.date(2026, 1, 1 + i) for i in range(20)], datetime.date(2026, 1, 8)),
    "time": ([datetime.time(i) for i in range(20)], datetime.time(7)),
    "bytes": ([bytes([65 + i]) for i in range(20)], b"G"),
    "single": (pa.array([i / 10 for i in range(20)], pa.float32()), 0.2),
    "words": (pa.array([f"w{i:02d}" for i in range(20)]).dictionary_encode(), "w07"),
    "stamp": (pa.array([10**9 * i for i in range(20)], pa.timestamp("ns", "UTC")), None),
}


@pytest.mark.parametrize("group_rows", [1, 20])
@pytest.mark.parametrize("how", ["==", "!=", "<", ">="])
@pytest.mark.parametrize("name", OTHERS)
def test_other_types_are_compared_as_what_they_are(tmp_path, name, how, group_rows):
    values, value = OTHERS[name]
    table = pa.table({"n": range(20), name: values})
    value = table[name][7].as_py() if value is None else value
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=group_rows)
    found = pcm.read_parquet(path, filters=[(name, how, value)]).compute(scheduler="sync")
    own = table[name].cast(table[name].type.value_type) if name == "words" else table[name]
    literal = pa.scalar(value).cast(own.type)  # 0.2 as the column has it
    is_so = {"==": pc.equal, "!=": pc.not_equal, "<": pc.less, ">=": pc.greater_equal}[how]
    assert found["n"].tolist() == table.filter(is_so(own, literal))["n"].to_pylist()


def test_values_to_choose_from_may_come_from_an_iterator(folder):
    found = pcm.read_parquet(folder, filters=[("plain", "in", map(int, "359"))])
    assert found.compute(scheduler="sync")["plain"].tolist() == [3, 5, 9]


def test_a_bound_between_two_integers(folder):
    found = pcm.read_parquet(folder, filters=[("plain", ">", 96.5)])
    assert found.compute(scheduler="sync")["plain"].tolist() == [97, 98, 99]


def test_row_groups_that_cannot_match_are_not_read(folder, monkeypatch):
    read = []
    was = cursors.Cursor.read

    def noting(cursor, start, stop):
        read.append((Path(cursor.key[0]).name, start, stop))
        return was(cursor, start, stop)

    monkeypatch.setattr(cursors.Cursor, "read", noting)
    ddf = pcm.read_parquet(folder, filters=[("plain", ">=", 93)])
    assert ddf.npartitions == 1
    assert ddf.compute(scheduler="sync")["plain"].tolist() == list(range(93, 100))
    assert read == [("1.parquet", 40, 50)]
    two = pcm.read_parquet(folder, filters=[[("plain", "<", 5)], [("plain", "==", 35)]])
    assert two.npartitions == 2 and two.divisions == (0, 30, 39)
    assert two.compute(scheduler="sync")["plain"].tolist() == [0, 1, 2, 3, 4, 35]


def test_filters_on_columns_that_are_not_wanted(folder):
    ddf = pcm.read_parquet(folder, "lang", filters=[("plain", "==", 7)])
    assert ddf.columns.tolist() == ["lang"]
    assert ddf.compute(scheduler="sync").lang.tolist() == ["de"]


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ([("number", "~", 1)], r"found \('number', '~', 1\)"),
        ([("number", ">")], "takes conditions such as"),
        ("number > 1", "takes conditions such as"),
        ([("number", "in", "abc")], "takes conditions such as"),
        ([], "filters is empty"),
        ([("year", ">", 1)], r"names 'year', which the input does not have; its columns are 'num"),
        ([("number", "<", 2**70)], "compares column 'number'"),
        ([("number", [1], 3)], "takes conditions such as"),
        ([("is_new", "==", "yes")], "compares column 'is_new'"),
        ([("at", ">", "soon")], "compares column 'at'"),
        ([("lang", ">", 1)], "compares column 'lang', which is string, with 1"),
    ],
)
def test_what_cannot_be_a_filter_is_refused_at_once(folder, filters, told):
    with pytest.raises(SchemaError, match=told):
        pcm.read_parquet(folder, filters=filters)


def label(frame, model):
    return frame[["plain"]].assign(verdict=model)


def test_a_run_over_filtered_rows_resumes(client, folder, tmp_path):
    def job(least):
        ddf = pcm.read_parquet(folder, filters=[("plain", ">=", least)])
        meta = {"plain": "i4", "verdict": "str"}
        return pcm.map_partitions(label, ddf, context=LLM, meta=meta, batch_rows=8)

    out = tmp_path / "out"
    report = write(job(35), out).report
    assert pd.read_parquet(out)["plain"].tolist() == list(range(35, 100))
    assert report.rows == 65
    next(out.glob("part-*.parquet")).unlink()
    assert write(job(35), out).report.state == "finished"
    assert sorted(pd.read_parquet(out)["plain"]) == list(range(35, 100))
    with pytest.raises(pcm.errors.OutputError):
        write(job(36), out)


def test_storage_options_reach_the_workers_and_nothing_else(client, object_store, bucket, tmp_path):
    """Credentials that the environment does not have; a wrong endpoint there would fail."""
    import s3fs

    options = {"key": "own", "secret": "hidden", "client_kwargs": {"endpoint_url": object_store}}
    fs = s3fs.S3FileSystem(**options)
    with fs.open(f"{bucket}/rows.parquet", "wb") as file:
        pq.write_table(pa.table({"plain": pa.array(np.arange(20, dtype="i4"))}), file)

    def job(options):
        ddf = pcm.read_parquet(bucket, storage_options=options)
        meta = {"plain": "i4", "verdict": "str"}
        return ddf, pcm.map_partitions(label, ddf, context=LLM, meta=meta, batch_rows=8)

    ddf, verdicts = job(options)
    out = tmp_path / "out"
    assert write(verdicts, out).report.rows == 20
    texts = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert not any(b"hidden" in text for text in texts) and "hidden" not in repr(ddf)
    # The same job with other keys.
    assert write(job({**options, "secret": "another"})[1], out).report.rows_recomputed == 0
    manifest = json.loads((out / "_pcm" / "manifest.json").read_text())
    assert "endpoint_url" not in json.dumps(manifest)
