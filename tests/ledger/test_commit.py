from __future__ import annotations

import errno
import multiprocessing
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_pcm.errors import FencedError, OutputError
from dask_pcm.ledger import commit
from dask_pcm.ledger.commit import Output, parse_name, partition_name, range_name
from dask_pcm.ledger.report import rows_recomputed

TABLE = pa.table({"x": [1, 2]})
NAME = range_name(0, 2)


@pytest.fixture
def output(tmp_path):
    output = Output.at(tmp_path / "out")
    output.open()
    return output


def test_names_sort_in_input_order_and_parse():
    ranges = [(0, 32), (32, 1_000), (1_000, 10**9), (10**9, 10**12)]
    names = [range_name(*pair) for pair in ranges]
    assert sorted(names) == names
    assert [parse_name(name) for name in names] == ranges
    assert parse_name(partition_name(7)) == 7
    assert parse_name("part-1.parquet") is None


def test_a_part_is_written_once(output):
    assert output.commit(NAME, TABLE, {"rows": 2})
    assert not output.commit(NAME, pa.table({"x": [9]}), {"rows": 1})
    assert pq.read_table(f"{output.path}/{NAME}").column("x").to_pylist() == [1, 2]
    assert output.read_note(NAME) == {"rows": 2}
    assert list(output.temporary.iterdir()) == []


def _commit(output, value, ready, results):
    ready.wait()
    results.put(output.commit(NAME, pa.table({"x": [value]}), {"rows": 1}))


def test_of_many_writers_one_is_first(output):
    spawn = multiprocessing.get_context("fork")
    ready, results = spawn.Event(), spawn.Queue()
    writers = [spawn.Process(target=_commit, args=(output, i, ready, results)) for i in range(8)]
    for writer in writers:
        writer.start()
    ready.set()
    won = [results.get(timeout=30) for _ in writers]
    for writer in writers:
        writer.join(30)
    assert won.count(True) == 1
    assert output.parts() == [NAME]


def test_a_run_that_was_replaced_can_write_nothing(output):
    newer = Output(output.path, "newer")
    newer.open()
    newer.fence()
    with pytest.raises(FencedError, match="replaced by a newer one"):
        output.commit(NAME, TABLE, {})
    with pytest.raises(FencedError):
        output.write_json("manifest.json", {})
    assert newer.parts() == []
    assert newer.commit(NAME, TABLE, {})


def test_a_run_that_is_replaced_between_write_and_link_commits_nothing(output, monkeypatch):
    def fence_first(temporary, final):
        Output(output.path, "newer").fence()
        return link(temporary, final)

    link = commit._link
    monkeypatch.setattr(commit, "_link", fence_first)
    with pytest.raises(FencedError):
        output.commit(NAME, TABLE, {})
    assert output.parts() == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_part_is_still_whole_and_kept(output, monkeypatch, code):
    def no_links(source, target):
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert output.commit(NAME, TABLE, {"rows": 2})
    assert not output.commit(NAME, pa.table({"x": [9]}), {"rows": 1})
    assert pq.read_table(f"{output.path}/{NAME}").num_rows == 2


def test_a_full_disk_leaves_nothing_behind(output, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        output.commit(NAME, TABLE, {})
    assert output.parts() == []


def test_closing_removes_what_dead_attempts_left(output):
    (output.temporary / "part.half").write_text("torn")
    output.close()
    assert not output.temporary.exists()
    other = Output(output.path, "next")
    other.open()
    (other.temporary / "left").write_text("")
    third = Output(output.path, "third")
    third.open()
    third.fence()
    assert sorted(p.name for p in third.home.iterdir()) == ["run-third", "started"]


def test_what_was_set_aside_is_put_back_unless_something_new_is_there(output):
    output.commit(NAME, TABLE, {"rows": 2})
    output.write_json("manifest.json", {"job": "old"})
    for has_new in (False, True):
        newer = Output(output.path, f"newer-{has_new}")
        newer.open()
        newer.set_aside()
        assert newer.parts() == [] and not (newer.home / "manifest.json").exists()
        newer.write_json("manifest.json", {"job": "new"})
        newer.commit(range_name(0, 0), TABLE.slice(0, 0), {"rows": 0})
        if has_new:
            newer.commit(range_name(5, 7), TABLE, {"rows": 2})
        newer.put_back()
        with pytest.raises(FencedError):
            newer.commit(range_name(7, 9), TABLE, {"rows": 2})
        kept = '"new"' if has_new else '"old"'
        assert kept in (newer.home / "manifest.json").read_text()
        new_parts = [range_name(0, 0), range_name(5, 7)]
        assert newer.parts() == (new_parts if has_new else [NAME])


def test_a_run_that_set_nothing_aside_keeps_what_it_has(output):
    output.set_aside()
    output.write_json("manifest.json", {"job": "first"})
    output.put_back()
    assert (output.home / "manifest.json").exists()


def test_an_unwritable_output_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write to the output folder"):
        Output.at(tmp_path / "file").open()


def test_rows_recomputed_compares_ranges_and_not_names(output):
    def starts(*rows):
        return [{"run": run, "unit": range_name(a, b), "rows": b - a} for run, a, b in rows]

    def again(*rows):
        return rows_recomputed(starts(*rows), "now", lambda name: 7)

    assert again(("now", 0, 10), ("now", 10, 20)) == 0
    assert again(("now", 0, 10), ("now", 0, 10)) == 10
    assert again(("before", 0, 15), ("now", 10, 20)) == 5
    assert again(("before", 0, 9), ("before", 0, 9), ("now", 9, 20)) == 0
    whole = [{"run": run, "unit": partition_name(3), "rows": None} for run in ("before", "now")]
    assert rows_recomputed(whole, "now", lambda name: 7) == 7
    assert rows_recomputed(whole[1:], "now", lambda name: 7) == 0
    assert rows_recomputed(whole[1:] * 2, "now", lambda name: 7) == 7


def test_starts_are_noted_line_by_line(output):
    output.note_start(NAME, 2)
    output.note_start(NAME, 2)
    with (next((output.home / "started").iterdir())).open("a") as file:
        file.write('{"run": "torn')
    assert list(output.starts()) == [{"run": output.run, "unit": NAME, "rows": 2}] * 2
