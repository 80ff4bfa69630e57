"""Cursors: a file is decoded once, forward, a little at a time."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.parquet import cursors as reading
from dask_pcm.parquet.cursors import read_rows
from dask_pcm.parquet.footers import describe_files


@pytest.fixture(autouse=True)
def no_cursors_left():
    reading.idle.clear()
    yield
    reading.idle.clear()


@pytest.fixture
def made(monkeypatch):
    """Cursors that were made."""
    cursors = []

    class Counted(reading.Cursor):
        def __init__(self, *args):
            super().__init__(*args)
            cursors.append(self)

    monkeypatch.setattr(reading, "Cursor", Counted)
    return cursors


def write(path, n_rows, row_group_size):
    pq.write_table(pa.table({"x": range(n_rows)}), path, row_group_size=row_group_size)
    (file,) = describe_files([str(path)])
    return file.path, file.modified, ("x",)


def rows(at, start, stop, row_bytes=8.0):
    tables = list(read_rows(*at, start, stop, row_bytes))
    return [x for table in tables for x in table["x"].to_pylist()]


@pytest.mark.parametrize("row_group_size", [1, 7, 100, 1000])
def test_any_rows_in_any_order(tmp_path, row_group_size):
    at = write(tmp_path / "a.parquet", 1000, row_group_size)
    random = np.random.default_rng(0)
    for _ in range(60):
        start, stop = sorted(random.integers(0, 1001, 2))
        row_bytes = random.choice([1.0, 1e6, 1e9])
        assert rows(at, start, stop, row_bytes) == list(range(start, stop))


def test_spans_one_after_the_other_are_one_pass(tmp_path, made):
    at = write(tmp_path / "a.parquet", 1000, 1000)
    for start in range(0, 1000, 50):
        assert rows(at, start, start + 50) == list(range(start, start + 50))
    assert len(made) == 1


def test_spans_that_others_took_are_skipped_in_the_same_pass(tmp_path, made):
    at = write(tmp_path / "a.parquet", 1000, 1000)
    for start in range(0, 1000, 100):
        assert rows(at, start, start + 50)[0] == start
    assert len(made) == 1
    assert rows(at, 0, 10) == list(range(10))  # backwards: another cursor
    assert len(made) == 2


def test_a_later_row_group_is_gone_to_at_once(tmp_path, made):
    at = write(tmp_path / "a.parquet", 1000, 10)
    assert rows(at, 0, 5) == list(range(5))
    assert rows(at, 955, 965) == list(range(955, 965))
    assert len(made) == 2 and made[1].at == 965


def test_two_threads_have_a_cursor_each_and_few_stay_open(tmp_path, made):
    paths = [write(tmp_path / f"{i}.parquet", 100, 100) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: rows(at, 0, 50), paths * 2))
        found = list(pool.map(lambda at: rows(at, 50, 100), paths))
    assert found == [list(range(50, 100))] * 12
    assert len(reading.idle._cursors) <= reading._MAX_IDLE


MEASURED = """
import sys, psutil, pyarrow as pa
from dask_pcm.parquet.footers import describe_files
from dask_pcm.parquet.cursors import read_rows
(file,) = describe_files([sys.argv[1]])
n, row_bytes = file.n_rows, sum(g.n_bytes for g in file.row_groups) / file.n_rows
process = psutil.Process()
list(read_rows(file.path, file.modified, ("id", "blob"), 0, 2, row_bytes))
before, peak, seen = process.memory_info().rss, 0, 0
for start in range(0, n, 40):
    for table in read_rows(file.path, file.modified, ("id", "blob"), start, start + 40, row_bytes):
        seen += len(table)
        peak = max(peak, process.memory_info().rss - before)
print(seen, peak)
"""


def test_rows_of_a_megabyte_in_one_row_group_take_little_memory(tmp_path):
    path, n_rows = tmp_path / "wide.parquet", 400
    blobs = pa.array([np.random.bytes(10**6) for _ in range(n_rows)], pa.binary())
    table = pa.table({"id": range(n_rows), "blob": blobs})
    # Pages of some megabytes: one is the least that can be read.
    pq.write_table(table, path, row_group_size=n_rows, write_batch_size=4, compression="none")
    found = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True
    )
    seen, peak = map(int, found.stdout.split())
    assert seen == n_rows
    assert peak < 100e6, peak  # the row group has 400 MB


def test_a_row_group_of_ten_million_rows_is_gone_through_a_little_at_a_time(tmp_path):
    n_rows = 10_000_000
    at = write(tmp_path / "long.parquet", n_rows, n_rows)
    pool = pa.default_memory_pool()
    before, peak, seen = pool.bytes_allocated(), 0, []
    for table in read_rows(*at, n_rows - 1_000, n_rows, 8.0):
        seen += table["x"].to_pylist()
        peak = max(peak, pool.bytes_allocated() - before)
    assert seen == list(range(n_rows - 1_000, n_rows))
    assert peak < 16 << 20  # all of them: 80 MB


def test_pieces_of_wide_rows_are_bounded_in_bytes(tmp_path):
    path = tmp_path / "wide.parquet"
    frame = pd.DataFrame({"id": range(64), "blob": [np.random.bytes(10_000) for _ in range(64)]})
    frame.to_parquet(path, index=False)
    pieces = pcm.read_parquet(path, bytes_per_piece="100 kB")
    assert pieces.npartitions == 7
    assert max(pieces.map_partitions(len).compute(scheduler="sync")) <= 10
    assert pieces.compute(scheduler="sync").equals(frame)
    narrow = pcm.read_parquet(path, columns=["id"], bytes_per_piece="100 kB")
    assert narrow.npartitions == 1


def test_types_are_the_same_however_little_is_read_at_a_time(tmp_path, monkeypatch):
    from tests.parquet.test_pieces import TYPES

    path = tmp_path / "types.parquet"
    pq.write_table(pa.concat_tables([TYPES] * 50), path)
    whole = pcm.read_parquet(path).compute(scheduler="sync")
    monkeypatch.setattr(reading, "BATCH_BYTES", 1)
    reading.idle.clear()
    one_by_one = pcm.read_parquet(path).compute(scheduler="sync")
    pd.testing.assert_frame_equal(one_by_one, whole)


def test_few_rows_at_a_time_until_it_is_known_what_they_take(tmp_path):
    """A text of 300 kB that stands in every row is stored once, and tells so only once read."""
    path = tmp_path / "same.parquet"
    table = pa.table({"x": pa.array(["x" * 300_000] * 200)})
    pq.write_table(table, path)
    (file,) = describe_files([str(path)])
    at = (file.path, file.modified, ("x",))
    footer_bytes = path.stat().st_size / 200
    sizes = [table.nbytes for table in read_rows(*at, 0, 50, footer_bytes)]
    assert max(sizes) < 3 * reading.BATCH_BYTES
    reading.note_inflation(file.path, sum(sizes), 50 * footer_bytes)
    sizes = [table.nbytes for table in read_rows(*at, 50, 200, footer_bytes)]
    assert max(sizes) <= 1.1 * reading.BATCH_BYTES


def test_once_it_is_known_narrow_rows_are_decoded_many_at_a_time(tmp_path, made):
    at = write(tmp_path / "a.parquet", 5_000, 5_000)
    assert rows(at, 0, 40) == list(range(40))
    reading.note_inflation(at[0], 320, 320)
    assert rows(at, 40, 5_000) == list(range(40, 5_000))
    assert [cursor.batch_rows for cursor in made] == [16, 256]
