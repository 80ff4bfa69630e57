"""``write_parquet`` on a real cluster."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import dask.dataframe as dd
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import LoadError, OutputError, RowCountError, SchemaError
from tests.test_pieces import TYPES

META = {"id": "i8", "verdict": "str"}


def load(name="model"):
    return name


def verify(frame, model):
    return pd.DataFrame({"id": frame["id"], "verdict": model + frame["claim"]})


def other(frame, model):
    return pd.DataFrame({"id": frame["id"], "verdict": "other"})


def counted(frame, log):
    """Notes the rows that are computed."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (",".join(map(str, frame["id"])) + "\n").encode())
    os.close(descriptor)
    return pd.DataFrame({"id": frame["id"], "verdict": "x"})


def rows_in(log):
    text = Path(log).read_text() if os.path.exists(log) else ""
    return [int(row) for line in text.splitlines() for row in line.split(",")]


LLM = pcm.Context(load)


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "verdicts")


@pytest.fixture
def job(claims):
    folder = claims()

    def make(func=verify, context=LLM, batch_rows=8, **options):
        frame = pcm.read_parquet(folder, **options)
        return pcm.map_partitions(func, frame, context=context, meta=META, batch_rows=batch_rows)

    make.folder = folder
    return make


def write(frame, out, **options):
    return pcm.write_parquet(frame, out, progress=False, **options)


def test_every_row_once_in_order_readable_by_all(client, job, out):
    run = write(job(), out)
    assert (run.report.rows, run.report.rows_failed, run.report.rows_recomputed) == (200, 0, 0)
    found = pd.read_parquet(out)
    assert found.id.tolist() == list(range(200))
    assert found.verdict.iloc[5] == "modelclaim 5"
    assert dd.read_parquet(out).id.compute().tolist() == list(range(200))
    rows = duckdb.sql(f"select id from read_parquet('{out}/*.parquet') order by id").fetchall()
    assert rows == [(i,) for i in range(200)]
    everything = [p.name for p in Path(out, "_pcm").rglob("*")]
    assert not [name for name in everything if name.endswith(".parquet")]
    assert {p.name for p in Path(out, "_pcm").iterdir()} == {
        "manifest.json",
        "report.json",
        "started",
    }


def test_the_same_job_again_does_nothing(client, job, out):
    write(job(), out)
    before = {p.name: p.stat().st_mtime_ns for p in Path(out).glob("*.parquet")}
    run = write(job(), out)
    assert (run.report.rows, run.report.rows_resumed, run.report.units) == (200, 200, 0)
    assert run.report.context_loads == 0
    assert {p.name: p.stat().st_mtime_ns for p in Path(out).glob("*.parquet")} == before


def test_only_what_is_missing_is_done_whatever_the_unit_sizes(client, job, out, tmp_path):
    log = str(tmp_path / "log")
    context = pcm.Context(load, log)
    write(job(counted, context), out)
    parts = sorted(Path(out).glob("part-*.parquet"))[1:]
    removed = []
    for part in parts[1:4]:
        removed += pd.read_parquet(part).id.tolist()
        part.unlink()
    os.unlink(log)
    run = write(job(counted, context, rows_per_piece=17, batch_rows=5), out)
    assert sorted(rows_in(log)) == sorted(removed)
    assert run.report.rows_resumed == 200 - len(removed)
    assert pd.read_parquet(out).id.tolist() == list(range(200))


def test_progress_and_a_report_are_left(client, job, out, capfd):
    run = pcm.write_parquet(job(), out)
    shown = capfd.readouterr().err
    assert "200/200 rows" in shown and "workers warm" in shown
    report = json.loads(Path(out, "_pcm", "report.json").read_text())
    assert report == run.report.as_dict()
    wanted = "rows rows_failed rows_recomputed units units_resumed rows_resumed context_loads"
    wanted += " workers total_s load_s infer_s rows_per_s"
    assert set(wanted.split()) <= report.keys()
    assert report["workers"] == 2 and report["infer_s"] > 0 and report["total_s"] > 0


def test_errors_are_rows_and_are_counted(client, job, out):
    def picky(frame, model):
        if (frame["id"] == 77).any():
            raise ValueError("not this one")
        return verify(frame, model)

    run = write(job(picky), out)
    assert run.report.rows_failed == 1
    assert run.report.errors == ["ValueError: not this one"]
    assert pd.read_parquet(out).set_index("id").error.dropna().to_dict() == {
        77: "ValueError: not this one"
    }
    again = write(job(picky), out)
    assert (again.report.rows_failed, again.report.units) == (1, 0)


class TestAnotherJob:
    def refused(self, frame, out, message):
        before = {p: p.stat().st_mtime_ns for p in Path(out).rglob("*") if p.is_file()}
        with pytest.raises(OutputError, match=message):
            write(frame, out)
        assert {p: p.stat().st_mtime_ns for p in Path(out).rglob("*") if p.is_file()} == before

    def test_another_context_function_or_frame(self, client, job, out):
        write(job(), out)
        self.refused(job(context=pcm.Context(load, "b")), out, "its context is another")
        self.refused(job(other), out, "its function is another")
        frame = job()
        self.refused(frame[frame.id > 3], out, "its frame is another")

    def test_a_changed_a_new_and_a_missing_input_file(self, client, job, out):
        write(job(), out)
        path = Path(job.folder, "part-1.parquet")
        kept, status = path.read_bytes(), path.stat()
        frame = pd.read_parquet(path)
        frame.loc[3, "claim"] = "another"
        frame.to_parquet(path, index=False)
        self.refused(job(), out, r"input file '.*part-1\.parquet' has changed")
        path.write_bytes(kept)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert write(job(), out).report.units == 0
        frame.to_parquet(Path(job.folder, "part-9.parquet"), index=False)
        self.refused(job(), out, r"lacks '.*part-9\.parquet'")

    def test_overwriting_begins_anew(self, client, job, out):
        write(job(), out)
        run = write(job(other), out, overwrite=True)
        assert run.report.rows_resumed == 0 and run.report.rows == 200
        assert set(pd.read_parquet(out).verdict) == {"other"}
        assert run.report.rows_recomputed == 0

    def test_a_folder_with_other_files_is_never_touched(self, client, job, tmp_path):
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=r"files that are not ours, such as 'thesis"):
                write(job(), folder, overwrite=overwrite)
        assert (folder / "thesis.txt").read_text() == "years of work"
        assert sorted(p.name for p in folder.iterdir()) == ["thesis.txt"]

    def test_the_input_is_not_written_over(self, client, job):
        with pytest.raises(OutputError):
            write(job(), job.folder, overwrite=True)
        assert len(list(Path(job.folder).glob("*.parquet"))) == 4

    def test_a_format_of_another_version_and_a_broken_manifest(self, client, job, out):
        write(job(), out)
        manifest = Path(out, "_pcm", "manifest.json")
        text = manifest.read_text()
        manifest.write_text(text.replace('"format": 1', '"format": 99'))
        self.refused(job(), out, "has format 99; this version writes format 1")
        manifest.write_text(text[:50])
        self.refused(job(), out, "manifest .* cannot be read")
        manifest.unlink()
        self.refused(job(), out, "holds parts but no manifest")

    def test_cut_otherwise_functions_of_partitions_are_another_job(self, client, job, out):
        write(job(batch_rows=None), out)
        self.refused(job(batch_rows=None, rows_per_piece=10), out, "its piece is another")

    def test_an_unwritable_output(self, client, job, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="Cannot write to the output folder"):
            write(job(), tmp_path / "file" / "out")


class TestTypes:
    def test_columns_that_pass_through_are_kept_as_they_are(self, client, tmp_path, out):
        pq.write_table(TYPES, tmp_path / "types.parquet", row_group_size=2)
        frame = pcm.read_parquet(str(tmp_path / "types.parquet"), rows_per_piece=1)
        meta = frame._meta.assign(verdict=pd.Series([], dtype="str"))
        out_frame = pcm.map_partitions(
            lambda f, m: f.assign(verdict=m), frame, context=LLM, meta=meta, batch_rows=1
        )
        write(out_frame, out)
        found = pq.read_table(out)
        assert len(list(Path(out).glob("part-*.parquet"))) >= 3
        for name in TYPES.column_names:
            expected, got = TYPES.column(name), found.column(name)
            assert got.type == expected.type or name == "kind", name
            assert got.cast(expected.type).to_pylist() == expected.to_pylist(), name

    def test_an_index_of_the_users_is_kept(self, client, tmp_path, out):
        index = pd.Index([f"k{i}" for i in range(10)], name="key")
        pd.DataFrame({"id": range(10), "claim": "c"}, index=index).to_parquet(
            tmp_path / "i.parquet"
        )
        frame = pcm.read_parquet(str(tmp_path / "i.parquet"))
        write(pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=4), out)
        found = pd.read_parquet(out)
        assert found.index.name == "key" and found.index.tolist() == index.tolist()

    def test_an_empty_dataset_gives_an_empty_output(self, client, tmp_path, out):
        empty = pa.table({"id": pa.array([], pa.int64()), "claim": pa.array([], pa.string())})
        pq.write_table(empty, tmp_path / "e.parquet")
        frame = pcm.read_parquet(str(tmp_path / "e.parquet"))
        run = write(pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=4), out)
        assert run.report.rows == 0
        found = pd.read_parquet(out)
        assert len(found) == 0 and list(found.columns) == ["id", "verdict", "error"]


def test_whole_partitions_that_filter(client, job, out):
    def few(frame, model):
        return verify(frame, model)[lambda f: f.id % 10 == 0]

    run = write(job(few, batch_rows=None), out)
    assert run.report.rows == 20
    assert pd.read_parquet(out).id.tolist() == list(range(0, 200, 10))


def test_a_frame_that_dask_read(client, job, out):
    frame = dd.read_parquet(job.folder)
    make = lambda: pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=8)  # noqa: E731
    assert write(make(), out).report.rows == 200
    parts = sorted(p.name for p in Path(out).glob("part-p*.parquet"))
    assert parts == [f"part-p{i:08d}.parquet" for i in range(4)]
    Path(out, parts[2]).unlink()
    run = write(make(), out)
    assert (run.report.units, run.report.rows) == (1, 200)
    assert pd.read_parquet(out).id.nunique() == 200


def test_a_frame_with_a_join_below_and_a_filter_above(client, job, out):
    frame = dd.read_parquet(job.folder)
    joined = frame.merge(frame[["id"]], on="id")
    verdicts = pcm.map_partitions(verify, joined, context=LLM, meta=META, batch_rows=8)
    run = write(verdicts[verdicts.id >= 50], out)
    assert run.report.rows == 150
    assert sorted(pd.read_parquet(out).id) == list(range(50, 200))


def test_the_manifest_names_the_job_and_no_secret(client, job, out):
    write(job(), out)
    manifest = json.loads(Path(out, "_pcm", "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["identity"]["contexts"] == [LLM.digest]
    assert len(manifest["identity"]["input"]) == 4
    assert manifest["recorded"]["versions"]["dask_pcm"] == pcm.__version__
    assert manifest["recorded"]["contexts"] == {"load": LLM.digest}
    note = json.loads(pq.read_schema(sorted(Path(out).glob("*.parquet"))[1]).metadata[b"dask_pcm"])
    assert note["rows"] > 0 and note["failed"] == 0


def test_a_load_that_fails_ends_the_run_with_the_users_traceback(client, job, out):
    def broken():
        raise OSError("weights are gone")

    with pytest.raises(LoadError, match=r"(?s)in broken.*weights are gone") as caught:
        write(job(context=pcm.Context(broken)), out)
    assert any("run the same again" in note for note in caught.value.__notes__)


def test_a_loader_that_workers_cannot_import(client, job, out, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def load():\n    return 'm'\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with pytest.raises(LoadError, match=r"only_here.*upload_file"):
        write(job(context=pcm.Context(only_here.load)), out)


def test_a_broken_promise_ends_the_run(client, job, out):
    def short(frame, model):
        return verify(frame, model).iloc[:-1]

    with pytest.raises(RowCountError, match="got 8 rows and returned 7"):
        write(job(short), out)
    assert write(job(), out, overwrite=True).report.rows == 200


def test_not_a_dask_dataframe(out):
    with pytest.raises(SchemaError, match="write_parquet writes a Dask DataFrame"):
        pcm.write_parquet(pd.DataFrame(), out)


def test_readable_while_it_is_written(client, job, out, tmp_path):
    """pandas and Dask see whole parts with the right columns at any moment."""
    seen, done = [], threading.Event()

    def slow(frame, model):
        time.sleep(0.01)
        return verify(frame, model)

    def look():
        while not done.is_set():
            if list(Path(out).glob("*.parquet")):
                found = pd.read_parquet(out)
                assert list(found.columns) == ["id", "verdict", "error"]
                assert not found.id.duplicated().any()
                seen.append(len(found))
        return seen

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        write(job(slow), out)
        done.set()
        looking.result(30)
    assert seen == sorted(seen) and len(set(seen)) > 2


def test_no_file_or_task_is_left_behind(client, job, out):
    run = write(job(), out)
    assert run.report.units > 0
    names = {p.name for p in Path(out, "_pcm").iterdir()}
    assert not [name for name in names if name.startswith(("run-", "old-"))]

    def n_tasks(dask_scheduler):
        return len(dask_scheduler.tasks), len(dask_scheduler.plugins["pcm-gate"].runs)

    deadline = time.monotonic() + 10
    while client.run_on_scheduler(n_tasks) != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.05)
