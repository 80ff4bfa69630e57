"""Inventories: a part that was copied, edited or removed is never counted as it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.errors import OutputError
from dask_pcm.ledger.inventory import Counts, Extent, take_inventory
from dask_pcm.ledger.layout import LOG
from dask_pcm.ledger.log import read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import partition_name, range_name
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.ledger.storage import commit
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.tree import Tree
from dask_pcm.runs.progress.report import rows_recomputed
from tests.support.outputs import NAME, NOTE, OTHER, TABLE, at_work

N_ROWS = 200


@pytest.fixture(scope="module")
def client():
    """Threads: processes are not what this is about."""
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
    )
    with cluster, Client(cluster) as client:
        yield client


#: What is done beside the run when it comes to a row.
MEANWHILE = {}


def double(frame, context):
    from tests.ledger.test_inventory import MEANWHILE  # in here it is no part of the function

    for row, act in MEANWHILE.items():
        if row in frame["id"].values:
            act()
    return pd.DataFrame({"id": frame["id"], "twice": frame["id"] * 2})


@pytest.fixture
def job(tmp_path, client):
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    pd.DataFrame({"id": range(N_ROWS)}).to_parquet(source, index=False)
    MEANWHILE.clear()

    def run(batch_rows=10, **options):
        frame = pcm.map_partitions(
            double,
            pcm.read_parquet(source, rows_per_piece=50),
            context=pcm.Context(list),
            meta={"id": "i8", "twice": "i8"},
            batch_rows=batch_rows,
        )
        return pcm.write_parquet(frame, out, client=client, progress=False, **options)

    run.out = out
    return run


def parts(job):
    return sorted(path for path in job.out.glob("part-*") if path.name != range_name(0, 0))


def is_whole(job):
    found = pd.read_parquet(job.out)
    assert found.id.tolist() == list(range(N_ROWS))
    return (found.twice == 2 * found.id).all()


@pytest.mark.parametrize("batch_rows", [10, None], ids=["by rows", "partitions"])
@pytest.mark.parametrize(
    "name", [range_name(200, 210), partition_name(1), range_name(5, 200), range_name(150, 100)]
)
def test_a_copied_part_is_refused_and_nothing_is_lost(job, name, batch_rows):
    job(batch_rows)
    copy = job.out / name
    shutil.copy2(parts(job)[0], copy)
    with pytest.raises(OutputError, match=name):
        job(batch_rows)
    assert json.loads(Path(job.out, "_pcm/report.json").read_text())["state"] in (
        "failed",
        "finished",  # where it is refused before anything is begun
    )
    copy.unlink()
    assert job(batch_rows).report.units == 0 and is_whole(job)


def test_a_copy_in_the_place_of_a_part_that_is_gone(job):
    """Whether or not the log tells of what was there."""
    job()
    *_, last = parts(job)
    shutil.copy(parts(job)[0], last)
    for step in ("noted", "not noted"):
        with pytest.raises(OutputError, match=rf"{last.name}.* is a copy, or was renamed"):
            job()
        if step == "noted":
            shutil.rmtree(job.out / "_pcm" / "log")
    last.unlink()
    assert job().report.rows == N_ROWS and is_whole(job)


def test_two_parts_that_have_changed_places(job):
    job()
    first, second = parts(job)[:2]
    spare = first.with_suffix(".spare")
    first.rename(spare), second.rename(first), spare.rename(second)
    with pytest.raises(OutputError, match="is a copy, or was renamed"):
        job()


def test_parts_of_a_shorter_input_do_not_fit(job):
    extent = Extent(Ranges([(0, 50), (100, 150)]), 2, keeps_rows=True)
    assert extent.fault((100, 150), 50) is None
    assert "does not have (100 rows in all)" in extent.fault((40, 110), 70)
    assert "has 49 rows, for 50 rows" in extent.fault((0, 50), 49)
    assert "cut by rows" in extent.fault(1, 50)
    by_partition = Extent(None, 2, keeps_rows=False)
    assert by_partition.fault(1, 7) is None and by_partition.fault((0, 0), 0) is None
    assert "beyond the 2 partitions" in by_partition.fault(2, 7)
    assert "cut by partitions" in by_partition.fault((0, 50), 50)


def test_a_part_that_is_removed_meanwhile_is_computed_again(job):
    MEANWHILE[199] = lambda: [path.unlink() for path in parts(job)[:1]]
    run = job()
    assert run.report.rows == N_ROWS and run.report.state == "finished" and is_whole(job)


def test_parts_that_are_removed_for_ever_end_the_run(job):
    MEANWHILE.update(dict.fromkeys(range(N_ROWS), lambda: [p.unlink() for p in parts(job)]))
    with pytest.raises(OutputError, match=r"vanish again and again.*what removes them"):
        job()
    MEANWHILE.clear()
    assert job().report.rows == N_ROWS and is_whole(job)


@pytest.mark.parametrize("name", [range_name(200, 210), "a copy.parquet"])
def test_a_file_that_comes_in_meanwhile_fails_the_run(job, name):
    MEANWHILE[199] = lambda: shutil.copy(job.out / range_name(0, 0), job.out / name)
    with pytest.raises(OutputError, match=name):
        job()
    report = json.loads(Path(job.out, "_pcm/report.json").read_text())
    assert report["state"] == "failed" and name in report["error"]
    MEANWHILE.clear()
    (job.out / name).unlink()
    assert job().report.units == 0 and is_whole(job)


@pytest.mark.parametrize("key", ["run", "commit", "start", "rows", "failed", "bytes", "stamp"])
def test_a_finished_job_whose_log_is_damaged_is_finished(job, key):
    """Each time that it is looked at, and with lines that are no notes."""
    job()
    for path in (job.out / "_pcm" / "log").iterdir():
        text = path.read_bytes().replace(f'"{key}"'.encode(), f'"{key[:-1]}_"'.encode())
        path.write_bytes(text + b'5\nnull\n{"run": "x", "start": 5, "rows": 1}\n')
    for _ in range(2):
        report = job().report
        assert (report.state, report.units, report.rows) == ("finished", 0, N_ROWS)
    assert is_whole(job)


COMMIT_LINE = {"run": "r", "commit": NAME, "rows": 2, "failed": 0, "bytes": 9, "stamp": "1"}


#: JSON of another kind, types of another kind, keys that a flipped bit has renamed, and no JSON.
DAMAGED_LINES = [
    b"5",
    b"null",
    b"\xff\xfe{}",
    b"\0" * 64,
    b'{"run": "first", "commit',
    b"[" * 100_000,
    b"9" * 5_000,
    b'{"rwn": "first", "start": "part-000000000000-000000000002.parquet", "rows": 2}',
    b'{"run": "first", "start": 5, "rows": 1}',
    b'{"run": "first", "started": "part-000000000000-000000000002.parquet"}',
    b'{"run": "first", "called": [[2, 0]], "journal": null}',
    b'{"run": "first", "called": [[0, 1e400]], "journal": 3}',
    *(
        json.dumps({**COMMIT_LINE, key: value}).encode()
        for key, value in [("rows", -1), ("failed", True), ("bytes", 1.5), ("stamp", None)]
    ),
    *(
        json.dumps({k: v for k, v in COMMIT_LINE.items() if k != key}).encode()
        for key in ("run", "rows", "failed", "bytes", "stamp")
    ),
]


class TestInventory:
    def test_what_was_committed_is_counted(self, output):
        output.commit(NAME, [TABLE], lambda: {"rows": 2, "failed": 1})
        output.commit(range_name(2, 3), [OTHER], lambda: {"rows": 1, "failed": 0})
        assert take_inventory(output) == {NAME: Counts(2, 1), range_name(2, 3): Counts(1, 0)}

    def test_a_part_without_a_line_has_its_own_note(self, output):
        output.commit(NAME, [TABLE], lambda: {"rows": 2, "failed": 1})
        output.storage.remove(LOG)
        assert take_inventory(output) == {NAME: Counts(2, 1)}

    def test_a_removed_part_is_logged(self, output, caplog):
        output.commit(NAME, [TABLE], lambda: NOTE)
        output.storage.remove(NAME)
        assert take_inventory(output) == {}
        assert f"committed are gone, such as {NAME}" in caplog.text

    def test_a_part_that_was_edited_is_refused(self, output):
        """Also where the note was kept and the size is the same."""
        output.commit(NAME, [TABLE], lambda: NOTE)
        read = output.read_table(NAME)
        edited = read.set_column(0, "x", pa.array([1, 3]))
        sink = pa.BufferOutputStream()
        pq.write_table(edited.replace_schema_metadata(read.schema.metadata), sink)
        output.storage.write(NAME, sink.getvalue().to_pybytes())
        with pytest.raises(OutputError, match=rf"The part '{NAME}' in .* was changed since"):
            take_inventory(output)

    def test_a_copy_of_a_part_is_refused_under_any_other_name(self, output):
        output.commit(NAME, [TABLE], lambda: NOTE)
        with output.storage.reader(NAME) as file:
            content = file.read()
        for name in (range_name(2, 4), partition_name(7), range_name(0, 3)):
            output.storage.write(name, content)
            with pytest.raises(OutputError, match=rf"'{name}' in .* committed as '{NAME}'.*Remove"):
                take_inventory(output)
            output.storage.remove(name)
        assert take_inventory(output) == {NAME: Counts(2, 0)}

    def test_a_copy_in_the_place_of_a_part_is_refused(self, output):
        """Also where its size is that of the part that was there."""
        other = range_name(2, 4)
        for name in (NAME, other):
            output.commit(name, [TABLE], lambda: NOTE)
        with output.storage.reader(NAME) as file:
            output.storage.write(other, file.read())
        with pytest.raises(OutputError, match=f"'{other}' in .* was committed as '{NAME}'"):
            take_inventory(output)

    def test_a_part_written_twice_is_ours_when_its_last_line_is_lost(self, output):
        """To a full disk, a lost node, a flipped bit."""
        output.commit(NAME, [TABLE], lambda: {"rows": 2, "failed": 1})
        lines = list(read_lines(output))
        output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 0}, replaces=True)
        for name in output.storage.entries(LOG):
            output.storage.remove(f"{LOG}/{name}")
        for line in lines:
            output.storage.log.append(line)
        assert take_inventory(output) == {NAME: Counts(1, 0)}

    def test_damaged_lines_are_left_out(self, output, caplog):
        output.commit(NAME, [TABLE], lambda: NOTE)
        whole = list(read_lines(output))
        for number, text in enumerate(DAMAGED_LINES):
            output.storage.write(f"{LOG}/damaged-{number}", text)
        assert take_inventory(output) == {NAME: Counts(2, 0)}
        assert f"{len(DAMAGED_LINES)} damaged lines in the log" in caplog.text
        assert sorted(map(str, read_lines(output))) == sorted(map(str, whole))
        assert rows_recomputed(read_lines(output), "first", lambda name: 0) == 0

    def test_a_part_of_another_output_is_refused(self, output):
        output.commit(NAME, [TABLE], lambda: {**NOTE, "begun": "elsewhere"})
        if output.storage.allows_late_commits:
            assert take_inventory(output) == {}
        else:
            with pytest.raises(OutputError, match="is of another output"):
                take_inventory(output)

    def test_a_replaced_part_whose_run_died_right_after_is_ours(self, output, monkeypatch):
        output.commit(NAME, [TABLE], lambda: NOTE)

        def dies(*args):
            raise KeyboardInterrupt

        target, name = (
            (Tree, "sync_folder") if isinstance(output.storage, Folder) else (commit, "stamp_of")
        )
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(target, name, dies)
            output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 0}, replaces=True)
        assert take_inventory(output) == {NAME: Counts(1, 0)}

    def test_parts_with_rows_in_common(self, output):
        output.commit(range_name(0, 4), [TABLE, TABLE], lambda: {"rows": 4, "failed": 0})
        output.commit(range_name(3, 5), [TABLE], lambda: NOTE)
        if isinstance(output.storage, Folder):
            with pytest.raises(OutputError, match=r"part-0+3-0+5.* have rows in common"):
                take_inventory(output)
        else:  # a fenced run may put one late
            assert take_inventory(output) == {range_name(0, 4): Counts(4, 0)}
            assert list(output.parts()) == [range_name(0, 4)]

    def test_a_part_of_another_program_is_refused(self, output):
        sink = pa.BufferOutputStream()
        pq.write_table(TABLE, sink)
        output.storage.write(NAME, sink.getvalue().to_pybytes())
        with pytest.raises(OutputError, match="was not written by dask_pcm"):
            take_inventory(output)

    def test_a_torn_part_is_named(self, output):
        output.storage.write(NAME, b"PAR1 torn")
        with pytest.raises(OutputError, match=rf"part '{NAME}' .* cannot be read"):
            take_inventory(output)


def test_a_copy_of_an_output_is_the_same_output(tmp_path):
    import shutil

    first = Output(Folder(str(tmp_path / "first"), "run"))
    with at_work(first):
        first.commit(NAME, [TABLE], lambda: NOTE)
    shutil.copytree(first.path, tmp_path / "copy", copy_function=shutil.copy)  # at another time
    os.utime(tmp_path / "copy" / NAME, ns=(1, 1))
    assert take_inventory(Output(Folder(str(tmp_path / "copy"), "run"))) == {NAME: Counts(2, 0)}
