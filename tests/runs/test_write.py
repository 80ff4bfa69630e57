"""``write_parquet`` on a real cluster."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask.dataframe as dd
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import LoadError, OutputError, RowCountError, SchemaError
from tests.parquet.test_pieces import TYPES
from tests.support.jobs import LLM, META, load, verify
from tests.support.patience import patient, until


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
        "lock",
        "manifest.json",
        "report.json",
        "log",
        "journal",
    }
    assert not list(Path(out, "_pcm", "journal").iterdir())


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
    write(job(counted, context=context), out)
    parts = sorted(Path(out).glob("part-*.parquet"))[1:]
    removed = []
    for part in parts[1:4]:
        removed += pd.read_parquet(part).id.tolist()
        part.unlink()
    os.unlink(log)
    run = write(job(counted, context=context, rows_per_piece=17, batch_rows=5), out)
    assert sorted(rows_in(log)) == sorted(removed)
    assert run.report.rows_resumed == 200 - len(removed)
    assert pd.read_parquet(out).id.tolist() == list(range(200))


def test_progress_and_a_report_are_left(client, job, out, capfd):
    run = pcm.write_parquet(job(), out)
    shown = capfd.readouterr().err
    assert "200/200 rows" in shown and "2/2 warm" in shown
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
        self.refused(job(context=pcm.Context(load, "b")), out, "its context changed")
        says = r"job: its function changed \(the code of other is new\)\. Give"
        self.refused(job(other), out, says)
        frame = job()
        self.refused(frame[frame.id > 3], out, "its frame changed")

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

    def test_what_is_overwritten_stays_until_something_new_is_there(self, client, job, out):
        write(job(), out)
        before = {p.name: p.read_bytes() for p in Path(out).glob("*.parquet")}

        def broken():
            raise OSError("weights are gone")

        with pytest.raises(LoadError):
            write(job(context=pcm.Context(broken)), out, overwrite=True)
        assert {p.name: p.read_bytes() for p in Path(out).glob("*.parquet")} == before
        assert write(job(), out).report.units == 0

    def test_what_is_read_is_not_overwritten(self, client, job, out):
        write(job(), out)
        before = sorted(p.name for p in Path(out).glob("*.parquet"))
        for frame in (
            dd.read_parquet(out),
            pcm.read_parquet(out).merge(dd.read_parquet(out)[["id"]], on="id"),
        ):
            again = pcm.map_partitions(other, frame, context=LLM, meta=META)
            with pytest.raises(OutputError, match="overlap"):
                write(again, out, overwrite=True)
        with pytest.raises(OutputError, match="overlap"):
            write(job(), Path(job.folder, "verdicts"))
        assert sorted(p.name for p in Path(out).glob("*.parquet")) == before

    def test_two_runs_that_begin_at_once_never_destroy_each_other(self, client, job, out):
        """Two jobs, one fresh output, two threads: one finishes, the other is refused or fenced."""
        start = threading.Barrier(2, timeout=patient(30))

        def one(func):
            frame = job(func)
            start.wait()
            try:
                return write(frame, out).report.rows
            except pcm.PCMError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            results = [
                future.result(60) for future in [pool.submit(one, f) for f in (verify, other)]
            ]
        assert [r for r in results if r == 200] == [200]
        found = pd.read_parquet(out)
        assert found.id.tolist() == list(range(200))

    def test_a_second_input_that_changed(self, client, job, out, tmp_path):
        side = tmp_path / "side.parquet"
        pd.DataFrame({"id": range(200), "claim": "old"}).to_parquet(side)

        def joined():
            both = pcm.read_parquet(job.folder)[["id"]].merge(pcm.read_parquet(side), on="id")
            return pcm.map_partitions(verify, both, context=LLM, meta=META)

        write(joined(), out)
        assert write(joined(), out).report.units == 0
        pd.DataFrame({"id": range(200), "claim": "new"}).to_parquet(side)
        self.refused(joined(), out, r"side\.parquet' has changed")

    def test_a_folder_with_other_files_is_never_touched(self, client, job, tmp_path):
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=r"files of another program, such as 'thesis"):
                write(job(), folder, overwrite=overwrite)
        assert (folder / "thesis.txt").read_text() == "years of work"
        assert sorted(p.name for p in folder.iterdir()) == ["thesis.txt"]

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("name", ["lock", "log/zz", "old-x/aside/.loot"])
    def test_a_folder_with_links_that_were_put_there(
        self, client, job, out, tmp_path, name, overwrite
    ):
        """What they lead to is neither emptied nor moved, and the link is named."""
        home = tmp_path / "home"
        home.mkdir()
        (home / "key").write_text("precious")
        link = Path(out, "_pcm", name)
        link.parent.mkdir(parents=True)
        link.symlink_to(home / "key" if name == "lock" else home)
        with pytest.raises(OutputError, match=rf"'_pcm/{name}' in .* is a link|another program"):
            write(job(), out, overwrite=overwrite)
        assert (home / "key").read_text() == "precious"
        assert [path.name for path in home.iterdir()] == ["key"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives folders to another user")
    def test_a_folder_that_another_user_prepared(self, client, job, out):
        Path(out, "_pcm").mkdir(parents=True)
        os.chown(Path(out, "_pcm"), 65534, 65534)
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=r"'_pcm' in .* belongs to .*uid 65534"):
                write(job(), out, overwrite=overwrite)

    def test_the_input_is_not_written_over(self, client, job):
        with pytest.raises(OutputError):
            write(job(), job.folder, overwrite=True)
        assert len(list(Path(job.folder).glob("*.parquet"))) == 4

    def test_a_format_of_another_version_and_a_broken_manifest(self, client, job, out):
        write(job(), out)
        manifest = Path(out, "_pcm", "manifest.json")
        text = manifest.read_text()
        manifest.write_text(text.replace('"format": 2', '"format": 99'))
        self.refused(
            job(),
            out,
            r"has format 99, written by dask_pcm .*; this version reads and writes format 2",
        )
        manifest.write_text(text[:50])
        self.refused(job(), out, r"manifest\.json' in .* is damaged")
        manifest.unlink()
        self.refused(job(), out, "holds parts but no manifest")

    def test_cut_otherwise_functions_of_partitions_are_another_job(self, client, job, out):
        write(job(batch_rows=None), out)
        self.refused(
            job(batch_rows=None, rows_per_piece=10),
            out,
            r"part-0\.parquet' is cut into other pieces now",
        )

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

    def test_lists_that_a_function_makes_are_declared(self, client, job, out):
        def tagged(frame, model):
            tags = [["a"] * int(i % 3) if i % 5 else None for i in frame["id"]]
            return pd.DataFrame({"id": frame["id"], "tags": tags}, index=frame.index)

        def make(kind):
            frame = pcm.read_parquet(job.folder)
            meta = {"id": "i8", "tags": kind}
            return pcm.map_partitions(tagged, frame, context=LLM, meta=meta, batch_rows=1)

        with pytest.raises(SchemaError, match=r"'tags' has dtype object.*ArrowDtype"):
            write(make("object"), out)
        assert not list(Path(out).glob("*.parquet"))
        write(make(pd.ArrowDtype(pa.list_(pa.string()))), out)
        assert pq.read_table(out)["tags"].to_pylist()[:5] == [None, ["a"], ["a", "a"], [], ["a"]]

    def test_a_column_that_changes_its_meaning_loses_nothing_silently(self, client, tmp_path, out):
        import datetime as dt

        pq.write_table(pa.table({"day": [dt.date(2026, 1, 1)] * 4}), tmp_path / "d.parquet")
        frame = pcm.read_parquet(tmp_path / "d.parquet")

        def later(f, m):
            return f.assign(day=[dt.datetime(2026, 1, 1, 13, 30)] * len(f))

        verdicts = pcm.map_partitions(later, frame, context=LLM, meta=frame._meta, batch_rows=2)
        with pytest.raises(SchemaError, match=r"'day' is date32.*another name"):
            write(verdicts, out)

    def test_many_categories(self, client, tmp_path, out):
        names = pd.Categorical([f"c{i}" for i in range(1000)])
        frame = dd.from_pandas(pd.DataFrame({"id": range(1000), "name": names}), npartitions=2)
        verdicts = pcm.map_partitions(lambda f, m: f, frame, context=LLM, meta=frame._meta)
        write(verdicts, out)
        assert pd.read_parquet(out).name.astype(str).tolist() == [f"c{i}" for i in range(1000)]

    def test_an_unnamed_index_of_numbers_is_kept_and_our_row_numbers_are_not(
        self, client, job, out
    ):
        pandas = pd.DataFrame({"id": range(3), "claim": "c"}, index=[70, 50, 60])
        frame = dd.from_pandas(pandas, npartitions=1, sort=False)
        write(pcm.map_partitions(verify, frame, context=LLM, meta=META), out)
        assert pd.read_parquet(out).index.tolist() == [70, 50, 60]
        write(job(), out, overwrite=True)
        assert pq.read_schema(sorted(Path(out).glob("*.parquet"))[1]).names == [
            "id",
            "verdict",
            "error",
        ]

    def test_names_that_are_no_texts(self, client, out):
        frame = dd.from_pandas(pd.DataFrame({0: [1, 2]}), npartitions=1)
        verdicts = pcm.map_partitions(lambda f, m: f, frame, context=LLM, meta={0: "i8"})
        with pytest.raises(SchemaError, match=r"named by texts; found \[0\]"):
            write(verdicts, out)

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


def test_whatever_dask_makes_of_a_frame_can_be_written(client, job, tmp_path):
    """Persisted, joined, put together, repartitioned: above the map, and below."""
    claims = pcm.read_parquet(job.folder)
    verdicts = pcm.map_partitions(verify, claims, context=LLM, meta=META)
    frames = {
        "persisted": verdicts.persist(),
        "joined": verdicts.merge(claims, on="id"),
        "repartitioned": verdicts.repartition(npartitions=2),
        "persisted below": pcm.map_partitions(verify, claims.persist(), context=LLM, meta=META),
    }
    for name, frame in frames.items():
        write(frame, tmp_path / name)
        assert sorted(pd.read_parquet(tmp_path / name).id) == list(range(200)), name
        assert write(frame, tmp_path / name).report.units == 0, name
    both = dd.concat([verdicts, verdicts])
    write(both, tmp_path / "both")
    assert len(pd.read_parquet(tmp_path / "both")) == 400


def test_a_finished_job_computes_nothing_below_it_either(client, job, out, tmp_path):
    log = str(tmp_path / "log")
    context = pcm.Context(load, log)
    below = pcm.map_partitions(
        counted, pcm.read_parquet(job.folder), context=context, meta=META, batch_rows=8
    )
    joined = below.merge(below[["id"]], on="id")[["id"]]
    write(joined, out)
    n_computed = len(rows_in(log))
    write(joined, out)
    assert len(rows_in(log)) == n_computed


def test_partitions_picked_twice_are_refused(client, job, out):
    frame = pcm.read_parquet(job.folder).partitions[[0, 0]]
    verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=8)
    with pytest.raises(pcm.PCMError, match="picks partitions more than once"):
        write(verdicts, out)


@pytest.mark.parametrize(
    "leaving", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr
)
def test_a_function_that_exits_ends_no_worker(client, job, out, leaving):
    def leaves(frame, model):
        if (frame["id"] == 7).any():
            raise leaving
        return verify(frame, model)

    (error,) = write(job(leaves), out).report.errors
    assert error.startswith("RuntimeError") and error.endswith(f"raised {leaving!r}")


def test_the_manifest_names_the_job_and_no_secret(client, job, out):
    write(job(), out)
    manifest = json.loads(Path(out, "_pcm", "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["identity"]["contexts"] == [LLM.digest]
    assert len(manifest["identity"]["input"]) == 4
    assert manifest["recorded"]["versions"]["dask_pcm"] == pcm.__version__
    assert manifest["recorded"]["contexts"] == {"load": LLM.digest}
    note = json.loads(
        pq.read_metadata(sorted(Path(out).glob("*.parquet"))[1]).metadata[b"dask_pcm"]
    )
    assert note["rows"] > 0 and note["failed"] == 0


def test_a_load_that_fails_ends_the_run_with_the_users_traceback(client, job, out):
    def broken():
        raise OSError("weights are gone")

    with pytest.raises(LoadError, match=r"(?s)in broken.*weights are gone") as caught:
        write(job(context=pcm.Context(broken)), out)
    assert any("rerun the same call" in note for note in caught.value.__notes__)


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
    with pytest.raises(SchemaError, match="write_parquet needs a Dask DataFrame"):
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
        return len(dask_scheduler.tasks), len(dask_scheduler.plugins["pcm-gate"].runs.runs)

    until(lambda: client.run_on_scheduler(n_tasks) == (0, 0), 10)
