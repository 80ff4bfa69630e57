"""Inputs and outputs that are damaged, change meanwhile, or look like nothing else."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.errors import (
    BusyError,
    FailedRowsError,
    InputError,
    InstallError,
    OutputError,
    SchemaError,
)
from tests.support.jobs import LLM, META, found_in, verify, write
from tests.support.patience import patient, until


class TestBadInput:
    def test_parts_that_were_deleted_are_computed_again_and_it_is_said(
        self, client, job, out, noted, caplog
    ):
        write(job(noted), out)
        noted.ids()
        gone = sorted(Path(out).glob("part-*.parquet"))[2:4]
        rows = [i for part in gone for i in pd.read_parquet(part).id]
        for part in gone:
            part.unlink()
        write(job(noted), out)
        assert noted.ids() == sorted(rows)
        assert f"2 parts of {out} that were committed are gone" in caplog.text

    def test_a_part_that_was_edited_is_refused_and_nothing_is_touched(self, client, job, out):
        write(job(), out)
        part = sorted(Path(out).glob("part-*.parquet"))[2]
        pd.read_parquet(part).assign(verdict="forged").to_parquet(part)
        with pytest.raises(OutputError, match=f"The part '{part.name}' .* was changed since"):
            write(job(), out)
        assert set(pd.read_parquet(part).verdict) == {"forged"}
        part.unlink()
        assert write(job(), out).report.rows == 200
        assert not found_in(out).verdict.str.contains("forged").any()

    def test_an_input_file_that_changes_or_vanishes_while_it_is_read(self, client, job, out, gate):
        for change in ("changes", "vanishes"):
            run = write(job(gate), f"{out}-{change}", wait=False)
            last = Path(job.folder, "part-3.parquet")
            kept, status = last.read_bytes(), last.stat()
            if change == "changes":
                pd.DataFrame({"id": [1], "claim": ["x"]}).to_parquet(last, index=False)
            else:
                last.unlink()
            gate.open()
            expected = "has changed since it was listed" if change == "changes" else "Cannot read"
            with pytest.raises(InputError, match=rf"part-3\.parquet.*{expected}|{expected}"):
                run.wait(patient(30))
            last.write_bytes(kept)
            os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
            assert write(job(gate), f"{out}-{change}").report.rows == 200
            assert found_in(f"{out}-{change}").id.tolist() == list(range(200))
            os.unlink(gate.path)

    @pytest.mark.parametrize("then", [1, 4_000_000_000])
    def test_a_clock_that_jumps(self, client, job, out, gate, then):
        """Nothing that is decided hangs on the time of day, or on when a file was written."""
        run = write(job(gate), out, wait=False)
        self.touch(out, then)
        with pytest.raises(BusyError):
            write(job(gate), out)
        until(lambda: pcm.attach(out).status == "running")
        gate.open()
        assert run.wait(patient(30)).rows == 200
        self.touch(out, then)
        assert write(job(gate), out).report.units == 0

    def touch(self, out, then):
        for path in Path(out).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a temporary one
                os.utime(path, (then, then))

    def test_paths_with_blanks_percent_and_unicode(self, client, claims, tmp_path):
        folder = tmp_path / "my claims 100% é ☃"
        os.rename(claims(), folder)
        os.rename(folder / "part-0.parquet", folder / "part 0 %20 #?&.parquet")
        out = tmp_path / "my verdicts 100%25 é [1] ☃"
        frame = pcm.read_parquet(folder)
        verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=8)
        assert write(verdicts, out).report.rows == 200
        assert write(verdicts, out).report.units == 0
        assert len(pd.read_parquet(out)) == 200
        assert pcm.attach(out).status == "finished"

    def test_many_tiny_files(self, client, claims, out):
        frame = pcm.read_parquet(claims(n_files=1_500, n_rows=1))
        verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=32)
        run = write(verdicts, out)
        assert run.report.rows == 1_500 and run.report.units <= 48
        assert found_in(out).id.tolist() == list(range(1_500))

    def test_a_column_error_of_a_function_of_partitions_is_its_own_business(self, client, job, out):
        def grade(frame, model):
            return pd.DataFrame({"id": frame["id"], "error": 0.5})

        read = pcm.read_parquet(job.folder)
        meta = {"id": "i8", "error": "f8"}
        run = write(pcm.map_partitions(grade, read, context=LLM, meta=meta), out, max_failed_rows=0)
        assert (run.report.rows, run.report.rows_failed) == (200, 0)

    def test_failures_count_where_their_reasons_are_left_out(self, client, job, out, noted):
        noted.fail([3, 77])
        with pytest.raises(FailedRowsError, match="row 3 is bad"):
            write(job(noted)[["id", "verdict"]], out, max_failed_rows=1)
        run = write(job(noted)[["id", "verdict"]], out)
        assert run.report.rows_failed == 2
        noted.fail([])
        run = write(job(noted)[["id", "verdict"]], out, retry_failed=True)
        assert (run.report.rows, run.report.rows_failed) == (200, 0)
        assert found_in(out).verdict.notna().all()

    def test_a_column_named_like_ours(self, client, tmp_path, out):
        frame = pd.DataFrame({"id": range(4), "error": "mine", "claim": "c"})
        frame.to_parquet(tmp_path / "e.parquet", index=False)
        read = pcm.read_parquet(tmp_path / "e.parquet")
        kept = {"id": "i8", "error": "str"}
        with pytest.raises(SchemaError, match=r"already has a column 'error'"):
            pcm.map_partitions(
                lambda f, m: f[["id", "error"]], read, context=LLM, meta=kept, batch_rows=2
            )
        verdicts = pcm.map_partitions(verify, read, context=LLM, meta=META, batch_rows=2)
        assert write(verdicts, out).report.rows_failed == 0

    def test_columns_of_the_same_name(self, client, tmp_path, out):
        named = pd.DataFrame({"id": range(3), "claim": "c"}, index=pd.Index([1, 2, 3], name="id"))
        frame = dd.from_pandas(named, npartitions=1)
        verdicts = pcm.map_partitions(
            lambda f, m: f.assign(verdict=m),
            frame,
            context=LLM,
            meta=frame._meta.assign(verdict=""),
        )
        with pytest.raises(SchemaError, match="have the same name: id"):
            write(verdicts, out)
        twice = pd.DataFrame([[1, 2]], columns=["x", "x"])
        frame = dd.from_pandas(twice, npartitions=1)
        with pytest.raises(SchemaError, match="x"):
            pcm.map_partitions(lambda f, m: f, frame, context=LLM, meta=twice)

    @pytest.mark.parametrize("rows", [None, 16])
    @pytest.mark.parametrize("columns", [["id"], ["id", "verdict", "note"]])
    def test_columns_that_are_not_enforced_are_neither_missing_nor_lost(
        self, client, claims, out, columns, rows
    ):
        def other(frame, model):
            return frame.assign(verdict="", note="").loc[:, columns]

        frame = pcm.read_parquet(claims())
        loose = pcm.map_partitions(
            other, frame, context=LLM, meta=META, enforce_metadata=False, batch_rows=rows
        )
        with pytest.raises(SchemaError) as raised:
            write(loose, out)
        assert str(columns) in str(raised.value) and "meta says ['id'," in str(raised.value)

    @pytest.mark.parametrize(
        ("path", "said"),
        [
            ("", "is empty, or begins"),
            (" out", "begins or ends with a space"),
            ("s3:/bucket/out", "give 's3://bucket/out'"),
            (None, "expected a path or a URL"),
            (3, "expected a path or a URL"),
        ],
    )
    def test_a_path_that_names_another_folder_than_was_meant(
        self, client, job, tmp_path, monkeypatch, path, said
    ):
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(OutputError, match=said):
            pcm.write_parquet(job(), path)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("option", ["overwrite", "take_over"])
    def test_no_is_not_taken_for_yes(self, client, job, out, option):
        write(job(), out)
        with pytest.raises(OutputError, match=f"{option} is 'no'; expected True or False"):
            write(job(), out, **{option: "no"})
        assert len(found_in(out)) == 200

    @pytest.mark.parametrize("given", ["tcp://127.0.0.1:1", 3])
    def test_what_is_no_client_is_named(self, client, job, out, given):
        with pytest.raises(InstallError, match=r"expected a dask\.distributed\.Client"):
            write(job(), out, client=given)

    def test_a_number_of_rows_may_be_numpys_and_is_no_truth(self, client, claims):
        frame = pcm.read_parquet(claims())
        verify_by = {"context": LLM, "meta": META}
        found = pcm.map_partitions(verify, frame, batch_rows=np.int64(16), **verify_by)
        assert found.expr.operand("batch_rows") == 16
        with pytest.raises(SchemaError, match="at least 1; found True"):
            pcm.map_partitions(verify, frame, batch_rows=True, **verify_by)

    def test_wide_rows_are_units_of_few_rows(self, client, tmp_path, out):
        blobs = [np.random.bytes(200_000) for _ in range(60)]
        pd.DataFrame({"id": range(60), "blob": blobs}).to_parquet(tmp_path / "w.parquet")
        with dask.config.set({"pcm.run.unit-bytes": "1 MB"}):
            frame = pcm.read_parquet(tmp_path / "w.parquet")
            meta = {"id": "i8", "blob": "object"}
            verdicts = pcm.map_partitions(
                lambda f, m: f, frame, context=LLM, meta=meta, batch_rows=32
            )
            run = write(verdicts, out)
        assert run.report.units >= 12
        assert found_in(out).blob.tolist() == blobs


def test_counts_in_a_part_are_those_of_its_rows(client, job, out, noted):
    noted.fail([3, 4])
    write(job(noted), out)
    counts = Counter()
    for part in Path(out).glob("*.parquet"):
        note = json.loads(pq.read_metadata(part).metadata[b"dask_pcm"])
        counts.update(rows=note["rows"], failed=note["failed"])
    assert counts == {"rows": 200, "failed": 2}
