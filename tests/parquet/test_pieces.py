from __future__ import annotations

import datetime as dt
import decimal
import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import InputError, SchemaError
from dask_pcm.parquet.cursors import idle
from dask_pcm.parquet.footers import RowGroup, describe_files
from dask_pcm.parquet.pieces import cuts


def test_many_small_files_are_a_piece_each(claims):
    frame = pcm.read_parquet(claims(n_files=60, n_rows=5))
    assert frame.npartitions == 60
    assert frame[["id"]].optimize().npartitions == 60
    assert frame.divisions == (*range(0, 300, 5), 299)
    assert frame.compute(scheduler="sync").id.tolist() == list(range(300))


def test_one_file_of_a_hundred_row_groups_splits_at_them(tmp_path):
    file = tmp_path / "big.parquet"
    pd.DataFrame({"id": range(10_000)}).to_parquet(file, row_group_size=100, index=False)
    frame = pcm.read_parquet(str(file), rows_per_piece=1_000)
    assert frame.npartitions == 10
    assert frame.partitions[3].compute(scheduler="sync").id.tolist() == list(range(3_000, 4_000))
    assert pcm.read_parquet(str(file)).npartitions == 1


def test_a_large_row_group_is_split_into_near_equal_parts(tmp_path):
    file = tmp_path / "big.parquet"
    pd.DataFrame({"id": range(1_001)}).to_parquet(file, index=False)
    frame = pcm.read_parquet(str(file), rows_per_piece=500)
    assert frame.divisions == (0, 333, 667, 1_000)
    assert frame.compute(scheduler="sync").id.tolist() == list(range(1_001))


@pytest.mark.parametrize("groups", [[1] * 50, [10, 0, 3, 100, 7], [1_000], [99, 1, 99, 1], []])
@pytest.mark.parametrize("rows_per_piece", [1, 7, 100, 10_000])
@pytest.mark.parametrize("bytes_per_piece", [1, 40, 10**9])
def test_pieces_cover_every_row_once(groups, rows_per_piece, bytes_per_piece):
    found = list(cuts([RowGroup(n, 8 * n) for n in groups], rows_per_piece, bytes_per_piece))
    ends = [0, *(stop for stop, _ in found)]
    assert ends == sorted(set(ends))
    assert ends[-1] == sum(groups)
    for (a, b), (_, n_bytes) in zip(itertools.pairwise(ends), found, strict=True):
        assert b - a <= rows_per_piece
        assert n_bytes == 8 * (b - a)
        assert n_bytes <= bytes_per_piece or b - a == 1


def test_only_the_columns_asked_for_are_read(claims):
    folder = claims()
    assert list(pcm.read_parquet(folder, columns=["claim"]).columns) == ["claim"]
    pruned = pcm.read_parquet(folder)[["id"]].optimize(fuse=False)
    assert pruned.expr.operand("columns") == ["id"]
    with pytest.raises(SchemaError, match=r"no column 'verdict'; it has 'id', 'claim'"):
        pcm.read_parquet(folder, columns=["verdict"])


TYPES = pa.table(
    {
        "whole": pa.array([1, None, 2**60 + 1], pa.int64()),
        "flag": pa.array([True, None, False]),
        "byte": pa.array([1, 2, 3], pa.int8()),
        "real": pa.array([1.5, None, 2.5]),
        "text": ["a", None, "c"],
        "when": pa.array(
            [dt.datetime(2026, 1, 1), None, dt.datetime(1700, 1, 1)], pa.timestamp("us")
        ),
        "zoned": pa.array([0, None, 5], pa.timestamp("ns", "Europe/Prague")),
        "day": pa.array([dt.date(2026, 1, 1), None, dt.date(1700, 1, 1)]),
        "price": pa.array([decimal.Decimal("1.20"), None, decimal.Decimal("3.40")]),
        "tags": pa.array([["a", "b"], None, []], pa.list_(pa.string())),
        "deep": pa.array([{"x": 1, "y": ["z"]}, None, {"x": None, "y": []}]),
        "raw": pa.array([b"\x00\xff", None, b""]),
        "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
    }
)


def test_types_survive_reading(tmp_path):
    pq.write_table(TYPES, tmp_path / "types.parquet")
    frame = pcm.read_parquet(str(tmp_path / "types.parquet"))
    found = frame.compute(scheduler="sync")
    assert found.dtypes.astype(str).to_dict() == frame.dtypes.astype(str).to_dict()
    assert str(found.whole.dtype) == "Int64"
    assert found.whole.tolist()[2] == 2**60 + 1
    assert str(found.flag.dtype) == "boolean"
    assert found.byte.dtype == np.int8


def test_nulls_in_one_file_decide_for_all(tmp_path):
    pq.write_table(pa.table({"x": pa.array([1, 2])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([None, 2], pa.int64())}), tmp_path / "b.parquet")
    frame = pcm.read_parquet(str(tmp_path))
    assert str(frame.x.dtype) == "Int64"
    assert frame.partitions[0].compute(scheduler="sync").x.dtype == "Int64"


def test_a_pandas_index_is_kept(tmp_path):
    file = tmp_path / "indexed.parquet"
    pd.DataFrame({"x": [1, 2]}, index=pd.Index(["a", "b"], name="key")).to_parquet(file)
    frame = pcm.read_parquet(str(file))
    found = frame.compute(scheduler="sync")
    assert found.index.tolist() == ["a", "b"] and found.index.name == "key"
    assert list(frame.columns) == ["x"]
    assert not frame.known_divisions


def test_files_are_taken_in_natural_order_and_hidden_ones_left_out(tmp_path):
    for name in ["p-10", "p-9", "p-1"]:
        pd.DataFrame({"x": [int(name[2:])]}).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "q.parquet").write_text("torn")
    (tmp_path / "notes.txt").write_text("")
    frame = pcm.read_parquet(str(tmp_path))
    assert frame.compute(scheduler="sync").x.tolist() == [1, 9, 10]


def test_a_path_with_blanks_percent_and_unicode(tmp_path):
    folder = tmp_path / "my claims 100% é"
    folder.mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(folder / "a b%20c ü.parquet")
    assert pcm.read_parquet(str(folder)).compute(scheduler="sync").x.tolist() == [1]


def test_an_empty_dataset_has_one_empty_partition(tmp_path):
    pd.DataFrame({"x": pd.Series([], dtype="i8")}).to_parquet(tmp_path / "e.parquet", index=False)
    frame = pcm.read_parquet(str(tmp_path))
    assert frame.npartitions == 1
    assert len(frame.compute(scheduler="sync")) == 0


def test_no_column_at_all_keeps_the_rows(claims):
    frame = pcm.read_parquet(claims())[[]]
    assert frame.compute(scheduler="sync").shape == (200, 0)


def test_a_file_that_was_written_again_is_read_again_and_an_old_frame_says_so(tmp_path):
    file = tmp_path / "a.parquet"
    pd.DataFrame({"a": [1, 2, 3]}).to_parquet(file)
    old = pcm.read_parquet(str(file))
    assert old.compute(scheduler="sync").a.tolist() == [1, 2, 3]
    pd.DataFrame({"a": [7, 8]}).to_parquet(file)
    os.utime(file, ns=(1, 1))
    assert pcm.read_parquet(str(file)).compute(scheduler="sync").a.tolist() == [7, 8]
    idle.clear()
    with pytest.raises(InputError, match=r"a\.parquet' has changed since it was listed"):
        old.compute(scheduler="sync")
    file.unlink()
    with pytest.raises(InputError, match=r"Cannot read '.*a\.parquet'"):
        old.compute(scheduler="sync")


@pytest.mark.parametrize("first", ["empty", "full"])
def test_a_column_without_a_type_in_one_file_has_that_of_the_others(tmp_path, first):
    names = ["a", "b"] if first == "empty" else ["b", "a"]
    empty, full = (tmp_path / f"{name}.parquet" for name in names)
    pq.write_table(pa.table({"x": pa.nulls(1), "n": pa.nulls(1), "s": pa.nulls(1)}), empty)
    pq.write_table(pa.table({"x": ["t"], "n": [2**60 + 1], "s": [["u"]]}), full)
    frame = pcm.read_parquet(tmp_path)
    found = frame.compute(scheduler="sync").sort_values("n")
    assert found.dtypes.astype(str).to_dict() == frame.dtypes.astype(str).to_dict()
    assert found.x.tolist()[0] == "t" and str(found.n.dtype) == "Int64"
    assert found.n.tolist()[0] == 2**60 + 1 and found.n.isna().sum() == 1


def test_what_may_be_null_differs_from_file_to_file(tmp_path):
    for name, may in (("a", True), ("b", False)):
        item = pa.field("item", pa.string(), nullable=may)
        schema = pa.schema([pa.field("x", pa.int64(), may), pa.field("l", pa.list_(item))])
        table = pa.Table.from_pylist([{"x": 1, "l": ["u"]}], schema=schema)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert pcm.read_parquet(tmp_path).compute(scheduler="sync").x.tolist() == [1, 1]


def test_bytes_are_those_of_the_wanted_columns_whatever_their_names(tmp_path):
    path = tmp_path / "a.parquet"
    blobs = [np.random.bytes(1000) for _ in range(50)]
    deep = [{"u": 1, "v": [1, 2]}] * 50
    pq.write_table(pa.table({"deep": deep, "a.b": blobs, "n": range(50)}), path)

    def n_bytes(columns):
        (file,) = describe_files([str(path)], columns)
        return file.row_groups[0].n_bytes

    assert n_bytes(["a.b"]) >= 50_000 > n_bytes(["n"]) > 0
    assert n_bytes(None) >= n_bytes(["a.b"]) + n_bytes(["deep"]) + n_bytes(["n"])


def test_an_object_store_is_listed_anew_each_time(bucket, claims):
    import s3fs

    folder = claims(n_files=2)
    fs = s3fs.S3FileSystem()
    fs.put(folder, f"{bucket}/claims", recursive=True)
    assert len(pcm.read_parquet(f"{bucket}/claims")) == 100
    other = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)  # another process
    other.put(f"{folder}/part-0.parquet", f"{bucket}/claims/part-2.parquet")
    assert len(pcm.read_parquet(f"{bucket}/claims")) == 150
    old = pcm.read_parquet(f"{bucket}/claims")
    pd.DataFrame({"id": [1], "claim": ["x"]}).to_parquet(f"{folder}/new.parquet", index=False)
    other.put(f"{folder}/new.parquet", f"{bucket}/claims/part-2.parquet")
    with pytest.raises(InputError, match=r"part-2\.parquet' has changed since it was listed"):
        old.compute(scheduler="sync")
    assert len(pcm.read_parquet(f"{bucket}/claims").compute(scheduler="sync")) == 101


class TestBadInput:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match=r"no input at '.*nowhere'"):
            pcm.read_parquet(str(tmp_path / "nowhere"))

    def test_a_folder_without_parquet_files(self, tmp_path):
        (tmp_path / "claims.csv").write_text("id\n1\n")
        with pytest.raises(InputError, match=r"no Parquet files.*claims\.csv"):
            pcm.read_parquet(str(tmp_path))

    def test_a_file_that_is_not_parquet(self, tmp_path):
        (tmp_path / "a.csv").write_text("id\n1\n2\n3\n4\n5\n")
        with pytest.raises(InputError, match=r"a\.csv' is not a Parquet file"):
            pcm.read_parquet(str(tmp_path / "a.csv"))

    def test_a_torn_file_is_named(self, claims):
        folder = claims()
        path = Path(folder, "part-2.parquet")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match=r"part-2\.parquet' is truncated"):
            pcm.read_parquet(folder)

    def test_a_garbled_footer_is_named(self, claims):
        folder = claims()
        path = Path(folder, "part-1.parquet")
        whole = bytearray(path.read_bytes())
        n_footer = int.from_bytes(whole[-8:-4], "little")
        whole[-8 - n_footer : -8] = b"\xff" * n_footer
        path.write_bytes(whole)
        with pytest.raises(InputError, match=r"part-1\.parquet"):
            pcm.read_parquet(folder)

    def test_a_file_that_is_damaged_inside_its_data_is_named(self, tmp_path):
        path = tmp_path / "damaged.parquet"
        pd.DataFrame({"x": range(1000)}).to_parquet(path, index=False)
        frame = pcm.read_parquet(path)
        status, whole = path.stat(), bytearray(path.read_bytes())
        whole[4:600] = b"\xff" * 596
        path.write_bytes(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(InputError, match=r"Cannot read '.*damaged\.parquet'"):
            frame.compute(scheduler="sync")

    def test_schemas_that_differ(self, claims):
        folder = claims()
        pd.DataFrame({"id": ["x"], "claim": ["y"]}).to_parquet(f"{folder}/z.parquet", index=False)
        with pytest.raises(InputError, match=r"z\.parquet' differs.*'id' is"):
            pcm.read_parquet(folder)

    def test_a_name_that_stands_twice(self, tmp_path):
        table = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
        pq.write_table(table, tmp_path / "twice.parquet")
        with pytest.raises(SchemaError, match="more than once: x"):
            pcm.read_parquet(str(tmp_path))

    def test_folders_that_carry_columns(self, tmp_path):
        pd.DataFrame({"x": [1], "y": ["a"]}).to_parquet(tmp_path / "d", partition_cols=["y"])
        with pytest.raises(InputError, match=r"partitioned by folder names.*dask\.dataframe"):
            pcm.read_parquet(str(tmp_path / "d"))


@pytest.mark.parametrize("use", [pcm.read_parquet, pcm.attach])
def test_a_url_that_went_through_pathlib_is_not_taken_for_a_folder(use):
    with pytest.raises(InputError, match="Pass the string 's3://bucket/claims'"):
        use(Path("s3://bucket/claims"))
