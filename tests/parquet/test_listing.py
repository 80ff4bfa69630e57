"""Inputs as people name them: read to the last row, or refused with the way out."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import InputError, SchemaError
from dask_pcm.parquet.listing import find_files


def put(path, *ids):
    """A Parquet file with these rows."""
    os.makedirs(path.parent, exist_ok=True)
    pq.write_table(pa.table({"id": pa.array(ids, pa.int64()), "s": list("x" * len(ids))}), path)


def read(*args, **options):
    return pcm.read_parquet(*args, **options).compute(scheduler="sync").id.tolist()


@pytest.fixture
def days(tmp_path):
    """Three folders with two rows each, and what else lies about."""
    for day in range(3):
        put(tmp_path / f"day-{day}" / "a.parquet", 2 * day, 2 * day + 1)
    (tmp_path / "day-0" / "_SUCCESS").touch()
    (tmp_path / "notes.txt").write_text("not data")
    return tmp_path


SEVERAL = {
    "a list": lambda d: [f"{d}/day-1", d / "day-0"],
    "a tuple": lambda d: (d / "day-1", d / "day-0" / "a.parquet"),
    "a generator": lambda d: (d / f"day-{n}" for n in (1, 0)),
    "an array": lambda d: np.array([f"{d}/day-1", f"{d}/day-0"]),
    "a column": lambda d: pd.Series([f"{d}/day-1", f"{d}/day-0"]),
    "Arrow's": lambda d: pa.array([f"{d}/day-1", f"{d}/day-0"]),
    "URLs": lambda d: [f"file://{d}/day-1", os.fsencode(d / "day-0")],
}


@pytest.mark.parametrize("given", SEVERAL.values(), ids=SEVERAL)
def test_several_paths_are_read_in_their_order(days, given):
    assert read(given(days)) == [2, 3, 0, 1]


def test_a_set_of_paths_is_sorted(days):
    assert read({f"{days}/day-{n}" for n in range(3)}) == list(range(6))


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("day-*", range(6)),
        ("day-[01]", range(4)),
        ("day-?/*.parquet", range(6)),
        ("day-{0,2}", [0, 1, 4, 5]),
        ("day-{0,2}/{a,a}.parquet", [0, 1, 4, 5]),
        ("**/a.parquet", range(6)),
        ("**", range(6)),
        ("*", range(6)),
    ],
)
def test_patterns(days, pattern, ids):
    assert read(f"{days}/{pattern}") == list(ids)


def test_a_name_is_itself_before_it_is_a_pattern(tmp_path):
    for name in ("x[1]", "x1", "c{a,b}", "ca", "st*r", "wh?t"):
        put(tmp_path / name / "a.parquet", len(name))
    for name in ("x[1]", "c{a,b}", "st*r", "wh?t"):
        assert read(tmp_path / name) == [len(name)]


def test_home_and_relative_paths(days, monkeypatch):
    monkeypatch.setenv("HOME", str(days))
    monkeypatch.chdir(days)
    assert read("~/day-1") == read("day-1") == read("./day-1/../day-1/") == [2, 3]


def test_files_without_a_suffix_are_looked_into(tmp_path):
    for n in range(2):
        put(tmp_path / f"part-0000{n}", n)
    put(tmp_path / "more.dat", 7)
    put(tmp_path / "b.PARQUET", 3)
    (tmp_path / "log").write_text("not data")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    assert sorted(read(tmp_path)) == [0, 1, 3, 7]
    assert read(tmp_path / "part-*") == [0, 1]
    assert read(tmp_path / "more.dat") == [7]


def test_files_within_an_archive(days):
    archive = zipfile.ZipFile(days / "in.zip", "w")
    with archive:
        archive.write(days / "day-1" / "a.parquet", "in/a.parquet")
    for name in ("in", "in/a.parquet", "in/*.parquet"):
        assert read(f"zip://{name}::file://{days}/in.zip") == [2, 3]


def test_thousands_of_other_files_are_no_trouble(days):
    for n in range(3_000):
        (days / "day-0" / f"{n}.json").write_text("{}")
    assert read(days) == list(range(6))


class TestLinks:
    def test_folders_and_files_behind_links_are_read(self, days, tmp_path):
        put(tmp_path.parent / "store" / "b.parquet", 8)
        os.symlink(tmp_path.parent / "store", days / "day-3")
        put(tmp_path.parent / "other.parquet", 9)
        os.symlink(tmp_path.parent / "other.parquet", days / "day-0" / "z.parquet")
        assert sorted(read(days)) == [*range(6), 8, 9]
        assert sorted(read(f"{days}/**/*.parquet")) == [*range(6), 8, 9]
        assert read(f"{days}/*/b.parquet") == [8]

    def test_loops_end(self, days):
        os.symlink(days, days / "day-0" / "up")
        os.symlink(".", days / "day-1" / "here")
        os.symlink("../day-1", days / "day-2" / "one")
        assert read(days) == list(range(6))
        assert read(f"{days}/**") == list(range(6))

    def test_a_second_name_of_what_is_there_brings_no_rows_twice(self, days):
        os.symlink("day-2", days / "day-1-latest")
        os.symlink("a.parquet", days / "day-0" / "a-latest.parquet")
        for given in (days, f"{days}/*", f"{days}/day-*/*.parquet", f"{days}/**"):
            assert read(given) == list(range(6))
        _, urls = find_files([str(days)])
        assert not any("latest" in url for url in urls)

    def test_a_hard_link_brings_no_rows_twice_either(self, days):
        os.link(days / "day-0" / "a.parquet", days / "day-0" / "b.parquet")
        assert read(days) == list(range(6))
        with pytest.raises(InputError, match="is the same file"):
            read([days / "day-0" / "a.parquet", days / "day-0" / "b.parquet"])

    @pytest.mark.parametrize("name", ["a.parquet~", "a.parquet.bak", "A.OLD", "b.parquet.gz"])
    def test_what_may_be_a_copy_is_read_if_it_is_named_only(self, days, name):
        other = days / "day-0" / name
        other.write_bytes((days / "day-1" / "a.parquet").read_bytes())
        with pytest.raises(InputError, match=rf"{re.escape(name)}' has data.* name the files"):
            read(days)
        assert read(days / "*" / "*.parquet") == list(range(6))
        assert read(other) == [2, 3]

    @pytest.mark.parametrize("name", ["day-0/z.parquet", "day-3", "day-0/part-1"])
    def test_links_that_lead_nowhere_are_named(self, days, name):
        os.symlink("gone", days / name)
        for given in (days, days / name):
            with pytest.raises(InputError, match=f"{name}' is a link to 'gone', which does not"):
                read(given)

    def test_what_a_link_leads_to_is_seen_to_change(self, tmp_path):
        put(tmp_path / "real.parquet", 1, 2, 3)
        os.symlink("real.parquet", tmp_path / "link.parquet")
        frame = pcm.read_parquet(tmp_path / "link.parquet")
        put(tmp_path / "real.parquet", 4, 5, 6)
        os.utime(tmp_path / "real.parquet", ns=(1, 1))
        with pytest.raises(InputError, match=r"link\.parquet' has changed"):
            frame.compute(scheduler="sync")


class TestRefused:
    @pytest.mark.parametrize("given", [[], iter(()), np.array([], dtype=str)])
    def test_no_paths(self, given):
        with pytest.raises(InputError, match="list of input paths is empty"):
            pcm.read_parquet(given)

    @pytest.mark.parametrize("given", [None, 3, pd.DataFrame({"x": [1]}), {"a": "b"}])
    def test_what_is_no_path(self, given):
        with pytest.raises(InputError, match=f"found {type(given).__name__}.*from_pandas"):
            pcm.read_parquet(given)

    @pytest.mark.parametrize("given", ["", [""], b""])
    def test_an_empty_path(self, given):
        with pytest.raises(InputError, match="path is empty"):
            pcm.read_parquet(given)

    @pytest.mark.parametrize("given", ["nope://x", "s3://", "zip://x::file:///nowhere"])
    def test_what_a_filesystem_does_not_open(self, given):
        with pytest.raises(InputError, match=f"Cannot open the input '{given}'"):
            pcm.read_parquet(given)

    def test_a_name_that_is_no_text(self, tmp_path):
        put(tmp_path / "a.parquet", 1)
        os.rename(tmp_path / "a.parquet", os.fsencode(tmp_path) + b"/\xff.parquet")
        with pytest.raises(InputError, match=r"xff.parquet' is not valid UTF-8"):
            pcm.read_parquet(tmp_path)

    def test_a_list_with_something_else(self, days):
        with pytest.raises(InputError, match=r"All items.*found 7"):
            pcm.read_parquet([days, 7])

    @pytest.mark.parametrize("pattern", ["day-9", "day-[7-9]", "{day-0,day-9}", "**/x*.parquet"])
    def test_nothing_there(self, days, pattern):
        with pytest.raises(InputError, match=r"^There is no input at"):
            pcm.read_parquet(f"{days}/{pattern}")

    def test_a_folder_that_cannot_be_listed(self, days, monkeypatch):
        scandir = os.scandir

        def denied(path):
            if str(path).endswith("day-1"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", denied)
        with pytest.raises(InputError, match=r"Cannot list the folder '.*day-1'"):
            pcm.read_parquet(days)

    def test_a_file_by_two_names(self, days):
        (days / "again").symlink_to(days / "day-0")
        (days / "one").symlink_to(days / "day-0" / "a.parquet")
        for other in ("again", "one", "day-1/../day-0", "day-0/../day-0/a.parquet"):
            with pytest.raises(InputError, match=r"a\.parquet' twice.*is the same file"):
                read([days / "day-0", days / other])

    def test_another_way_to_write_what_is_there(self, tmp_path, monkeypatch):
        put(tmp_path / "run [1]" / "a.parquet", 1)
        monkeypatch.setenv("RUNS", str(tmp_path))
        for given, meant in {
            f"{tmp_path}/run [1]/*": "run [[]1]/*",
            f"{tmp_path}/run%20[1]": "run [1]",
            "$RUNS": str(tmp_path),
        }.items():
            with pytest.raises(InputError, match=re.escape(f"{meant}'?")):
                read(given)
        assert read(f"{tmp_path}/run [[]1]/*") == [1]

    def test_files_that_are_open(self, days):
        path = days / "day-0" / "a.parquet"
        with open(path, "rb") as file:
            for given in (file, io.BytesIO(path.read_bytes())):
                with pytest.raises(InputError, match="not open files"):
                    pcm.read_parquet(given)

    def test_links_to_folders_that_hold_columns(self, tmp_path):
        put(tmp_path / "hive" / "k=1" / "a.parquet", 1)
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "one").symlink_to(tmp_path / "hive" / "k=1")
        with pytest.raises(InputError, match="partitioned by folder names"):
            read(tmp_path / "linked")
        assert read(tmp_path / "linked" / "one") == [1]

    def test_a_key_and_a_secret_in_the_url_of_a_bucket(self):
        with pytest.raises(InputError, match=r"cannot contain a key.*'s3://box/a'") as raised:
            pcm.read_parquet("s3://key:secret@box/a")
        assert "secret@" not in str(raised.value)

    def test_a_file_that_is_named_twice(self, days):
        with pytest.raises(InputError, match=r"a\.parquet' twice.*day-0' and .*Name each"):
            pcm.read_parquet([days / "day-0", days / "day-1", days / "day-0" / "a.parquet"])

    def test_patterns_over_folders_that_carry_columns(self, tmp_path):
        put(tmp_path / "y=1" / "a.parquet", 1)
        put(tmp_path / "y=2" / "a.parquet", 2)
        for given in (tmp_path, f"{tmp_path}/*/a.parquet", f"{tmp_path}/y=*", f"{tmp_path}/**"):
            with pytest.raises(InputError, match="partitioned by folder names"):
                pcm.read_parquet(given)
        with pytest.raises(InputError, match=r"y=1' and '.*y=2' are partitioned"):
            pcm.read_parquet([tmp_path / "y=1", tmp_path / "y=2"])
        assert read(tmp_path / "y=1") == read(f"{tmp_path}/y=1/*") == [1]


class TestColumns:
    @pytest.mark.parametrize("columns", ["id", ["id"], ("id",), {"id"}, pd.Index(["id"])])
    def test_as_people_name_them(self, days, columns):
        assert list(pcm.read_parquet(days, columns=columns).columns) == ["id"]

    def test_from_a_generator(self, days):
        assert list(pcm.read_parquet(days, columns=(c for c in ("s", "id"))).columns) == ["s", "id"]

    @pytest.mark.parametrize(
        ("columns", "said"),
        [
            (["id", "id"], "'id' more than once"),
            ([0], "strings in Parquet files; found 0"),
            (5, "found 5"),
            ([None], "found None"),
            (["i"], "no column 'i'; it has 'id', 's'"),
        ],
    )
    def test_what_they_cannot_be(self, days, columns, said):
        with pytest.raises(SchemaError, match=said):
            pcm.read_parquet(days, columns=columns)


def test_an_input_in_an_object_store_is_named_alike(bucket, tmp_path):
    import s3fs

    put(tmp_path / "day-0" / "part-0", 0)
    put(tmp_path / "day-1" / "a.parquet", 1)
    (tmp_path / "day-1" / "_SUCCESS").touch()
    (tmp_path / "day-1" / "notes.txt").write_text("not data")
    s3fs.S3FileSystem().put(str(tmp_path), f"{bucket}/in", recursive=True)
    assert read(f"{bucket}/in") == [0, 1]
    assert read(f"{bucket}/in/day-*") == [0, 1]
    assert read(f"{bucket}/in/day-{{0,1}}") == [0, 1]
    assert read([f"{bucket}/in/day-1", f"{bucket}/in/day-0"]) == [1, 0]
    assert read(Path(tmp_path / "day-0")) == [0]
