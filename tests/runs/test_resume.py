"""Runs that take an output further: new input files, failed rows again, other versions."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import (
    InputError,
    OutputError,
    RunCancelledError,
)
from dask_pcm.runs import identity as manifest
from tests.support.jobs import LLM, META, found_in, note_in, verify, write
from tests.support.patience import patient


class TestExtend:
    def add(self, job, name, ids):
        frame = pd.DataFrame({"id": ids, "claim": [f"claim {i}" for i in ids]})
        frame.to_parquet(Path(job.folder, name), index=False)

    def test_new_files_are_taken_in_wherever_they_sort(self, client, job, out, noted):
        write(job(noted), out)
        noted.ids()
        before = {p.name: p.stat().st_mtime_ns for p in Path(out).glob("*.parquet")}
        self.add(job, "a-before-all.parquet", range(1000, 1030))
        self.add(job, "part-1-between.parquet", range(2000, 2010))
        with pytest.raises(OutputError, match=r"lacks '.*a-before-all.*extend=True.*2 of them"):
            write(job(noted), out)
        run = write(job(noted), out, extend=True)
        new = [*range(1000, 1030), *range(2000, 2010)]
        assert noted.ids() == new
        assert (run.report.rows, run.report.rows_resumed) == (240, 200)
        assert found_in(out).id.tolist() == sorted([*range(200), *new])
        after = {p.name: p.stat().st_mtime_ns for p in Path(out).glob("*.parquet")}
        assert before.items() <= after.items()
        # From now on they belong to the job, in the order in which they came.
        assert write(job(noted, rows_per_piece=13), out).report.units == 0
        self.add(job, "0.parquet", [7000])
        Path(sorted(Path(out).glob("part-*.parquet"))[3]).unlink()
        write(job(noted), out, extend=True)
        assert len(found_in(out)) == 241 and found_in(out).id.is_unique

    def test_changed_and_missing_files_are_refused_by_name(self, client, job, out):
        write(job(), out)
        self.add(job, "new.parquet", [1000])
        self.add(job, "part-2.parquet", range(50))
        with pytest.raises(OutputError, match=r"file '.*part-2\.parquet' has changed"):
            write(job(), out, extend=True)
        Path(job.folder, "part-2.parquet").unlink()
        with pytest.raises(
            OutputError, match=r"input has '.*part-2\.parquet', which this one lacks"
        ):
            write(job(), out, extend=True)

    def test_a_new_output_may_be_extended_from_the_beginning(self, client, job, out):
        assert write(job(), out, extend=True).report.rows == 200

    def test_the_first_nulls_come_with_a_new_file(self, client, job, out):
        """Whole numbers become nullable: the same job all the same."""
        keep = lambda f, m: f.assign(verdict=m)  # noqa: E731

        def frame():
            read = pcm.read_parquet(job.folder)
            meta = read._meta.assign(verdict="x")
            return pcm.map_partitions(keep, read, context=LLM, meta=meta, batch_rows=8)

        write(frame(), out)
        new = pd.DataFrame({"id": pd.array([None, 1000], dtype="Int64"), "claim": ["a", "b"]})
        new.to_parquet(Path(job.folder, "z.parquet"), index=False)
        assert write(frame(), out, extend=True).report.rows == 202
        assert pq.read_table(out)["id"].null_count == 1

    def test_functions_of_partitions(self, client, job, out, noted):
        write(job(noted, batch_rows=None), out)
        noted.ids()
        self.add(job, "a.parquet", [1000, 1001])
        assert write(job(noted, batch_rows=None), out, extend=True).report.rows == 202
        assert noted.ids() == [1000, 1001]

    def test_other_frames_cannot_be_extended(self, client, job, out):
        frame = dd.read_parquet(job.folder)
        verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META)
        with pytest.raises(InputError, match=r"extend=True takes in new files of pcm\.read"):
            write(verdicts, out, extend=True)


class TestRetry:
    BAD = (3, 77, 78, 199)

    def check(self, out, failed):
        found = found_in(out).set_index("id")
        assert found.index.tolist() == list(range(200))
        assert found.error.dropna().to_dict() == {i: f"ValueError: row {i} is bad" for i in failed}
        good = found[found.error.isna()]
        assert (good.verdict == "modelclaim " + good.index.astype("str")).all()

    def test_only_failed_rows_are_computed_again(self, client, job, out, noted):
        noted.fail(self.BAD)
        write(job(noted), out)
        self.check(out, self.BAD)
        names = {p.name for p in Path(out).glob("*.parquet")}
        noted.ids()
        noted.fail([77])
        run = write(job(noted), out, retry_failed=True)
        assert noted.ids() == [3, 78, 199]
        self.check(out, [77])
        report = run.report
        assert (report.rows, report.rows_failed, report.rows_retried) == (200, 1, 4)
        assert report.rows_recomputed == 0
        assert {p.name for p in Path(out).glob("*.parquet")} == names
        noted.fail([])
        assert write(job(noted), out).report.rows_failed == 1  # not unasked
        assert write(job(noted), out, retry_failed=True).report.rows_failed == 0
        self.check(out, [])
        assert write(job(noted), out, retry_failed=True).report.units == 0

    def test_with_rows_missing_as_well(self, client, job, out, noted):
        noted.fail(self.BAD)
        write(job(noted), out)
        sorted(Path(out).glob("part-*.parquet"))[-2].unlink()
        noted.fail([])
        run = write(job(noted), out, retry_failed=True)
        self.check(out, [])
        assert run.report.rows == 200

    def test_ended_early_it_tells_what_has_failed_so_far(self, client, job, out, noted, gate):
        noted.fail(self.BAD)
        write(job(noted), out)
        run = write(job(noted), out, retry_failed=True, wait=False)
        run.cancel()
        with contextlib.suppress(RunCancelledError):
            run.wait(patient(30))
        n_failed = int(pd.read_parquet(out).error.notna().sum())
        assert run.report.rows_failed == n_failed

    def test_a_part_tells_of_both_its_runs(self, client, job, out, noted):
        noted.fail([3])
        first = write(job(noted), out).report.run
        noted.fail([])
        second = write(job(noted), out, retry_failed=True).report.run
        (note,) = (n for n in map(note_in, Path(out).glob("*.parquet")) if "retried" in n)
        assert note["run"] == first and note["failed"] == 0
        assert [(again["run"], again["rows"]) for again in note["retried"]] == [(second, 1)]

    @pytest.mark.parametrize("damage", ["lost", "one flipped bit"])
    def test_a_part_written_again_whose_log_line_is_lost_is_still_ours(
        self, client, job, out, noted, damage
    ):
        """Of a node that lost power, or a worn disk: the part's own note decides."""
        noted.fail(self.BAD)
        write(job(noted), out)
        log = Path(out, "_pcm", "log")
        before = {path.name: path.read_bytes() for path in log.iterdir()}
        noted.fail([])
        assert write(job(noted), out, retry_failed=True).report.rows_failed == 0
        for path in log.iterdir():
            kept, added = before.get(path.name, b""), path.read_bytes()
            if damage == "lost":
                path.write_bytes(kept)
            else:
                added = added[len(kept) :]
                path.write_bytes(kept + added.replace(b'"commit"', b'"bommit"'))
        noted.ids()
        run = write(job(noted), out)
        assert (run.report.units, run.report.rows_failed, noted.ids()) == (0, 0, [])
        self.check(out, [])

    def test_below_a_filter_the_part_is_computed_again(self, client, job, out, noted):
        keep = lambda v: v.id % 2 == 1  # noqa: E731
        noted.fail([3])
        write(job(noted, keep=keep), out)
        noted.fail([])
        run = write(job(noted, keep=keep), out, retry_failed=True)
        found = found_in(out)
        assert found.id.tolist() == list(range(1, 200, 2)) and found.error.isna().all()
        assert (run.report.rows, run.report.rows_failed) == (100, 0)

    def test_of_a_frame_that_dask_read(self, client, job, out, noted):
        def frame():
            read = dd.read_parquet(job.folder)
            return pcm.map_partitions(noted, read, context=LLM, meta=META, batch_rows=8)

        noted.fail([3])
        write(frame(), out)
        noted.fail([])
        run = write(frame(), out, retry_failed=True)
        self.check(out, [])
        assert (run.report.rows, run.report.rows_retried) == (200, 50)

    def test_an_index_and_extra_columns_stay_with_their_rows(self, client, tmp_path, out, noted):
        index = pd.Index([f"k{i}" for i in range(40)], name="key")
        frame = pd.DataFrame({"id": range(40), "claim": "c"}, index=index)
        frame.to_parquet(tmp_path / "i.parquet")

        def job():
            read = pcm.read_parquet(tmp_path / "i.parquet")
            return pcm.map_partitions(noted, read, context=LLM, meta=META, batch_rows=4)

        noted.fail([5, 11])
        write(job(), out)
        noted.fail([])
        write(job(), out, retry_failed=True)
        found = pd.read_parquet(out).sort_values("id")
        assert found.index.tolist() == index.tolist() and found.error.isna().all()


class TestProvenance:
    def test_every_part_tells_where_it_comes_from(self, client, claims, out):
        from dask_pcm.factcheck import PROMPT, demo_model, generate

        source = Path(claims(), "claims.parquet")
        for old in source.parent.iterdir():
            old.unlink()
        generate(40, seed=1).to_parquet(source, index=False)
        llm = demo_model()
        frame = pcm.read_parquet(source)
        choices = ["SUPPORTED", "REFUTED"]
        write(pcm.classify(frame, llm, prompt=PROMPT, choices=choices), out)
        part = sorted(Path(out).glob("part-*.parquet"))[-1]
        note = json.loads(pq.read_metadata(part).metadata[b"dask_pcm"])
        assert note["format"] == manifest.FORMAT
        assert note["contexts"] == {llm.name: llm.digest}
        assert note["models"][llm.name]["commit"] == llm.commit
        assert (note["prompt"], note["choices"]) == (PROMPT, choices)
        assert note["device"] == "cpu" and note["dtype"]
        assert {"dask_pcm", "python", "dask", "torch", "transformers"} <= note["versions"].keys()
        written = json.loads(Path(out, "_pcm", "manifest.json").read_text())
        assert written["recorded"]["versions"]["dask_pcm"] == pcm.__version__
        assert written["recorded"]["committed_by"] == "hard links"
        report = pcm.attach(out).report
        assert report.committed_by == "hard links"
        assert sum(report.ran_on.values()) == 40 and "cpu" in next(iter(report.ran_on))

    def test_another_patch_of_the_package_resumes(self, client, job, out, monkeypatch):
        write(job(), out)
        install = sys.modules["dask_pcm.plugins.install"]
        monkeypatch.setattr(install, "__version__", "0.1.99")
        assert write(job(), out).report.units == 0

    def test_one_that_gives_other_answers_does_not(self, client, job, out, monkeypatch):
        write(job(), out)
        monkeypatch.setattr(manifest, "ANSWERS", manifest.ANSWERS + 1)
        with pytest.raises(OutputError, match="that began it gives other answers"):
            write(job(), out)
