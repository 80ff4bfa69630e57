"""Runs that end because too many rows fail."""

from __future__ import annotations

import os
import traceback

import dask.dataframe as dd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import (
    FailedRowsError,
)
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.storage.folder import Folder
from tests.support.jobs import LLM, META, verify, write


class TestTooManyFailures:
    def test_a_hopeless_run_ends_early_and_can_be_mended(self, client, job, out, noted):
        noted.fail(range(1, 100))
        with pytest.raises(FailedRowsError, match=r"rows failed, more than max_failed_rows=10"):
            write(job(noted), out, max_failed_rows=10)
        report = pcm.attach(out).report
        assert report.state == "failed" and report.rows < 200
        assert "is bad" in str(report.errors)
        noted.fail([])
        with pytest.raises(FailedRowsError, match="in an earlier run"):
            write(job(noted), out, max_failed_rows=10)
        done = write(job(noted), out, max_failed_rows=10, retry_failed=True)
        assert (done.report.rows, done.report.rows_failed) == (200, 0)

    def test_a_share_of_all_rows(self, client, job, out, noted):
        noted.fail([1, 2])
        assert write(job(noted), out, max_failed_share=0.01).report.rows_failed == 2
        with pytest.raises(FailedRowsError, match=r"max_failed_share=0\.005 allows of 200"):
            write(job(noted), out, max_failed_share=0.005)

    def test_a_share_says_nothing_before_1000_rows(self, client, claims, out, noted):
        """Half of all rows fail, too many at any time: it is looked at once there are 1,000."""

        def half(f, model):
            errors = [None if i % 2 else "even" for i in f["id"]]
            return verify(f, model).assign(error=errors)

        frame = pcm.read_parquet(claims(n_files=40, n_rows=100))
        verdicts = pcm.map_partitions(half, frame, context=LLM, meta=META, batch_rows=20)
        with pytest.raises(FailedRowsError, match=r"=0\.3 allows of [1-3],\d\d\d; .* to be done"):
            write(verdicts, out, max_failed_share=0.3)

    def test_of_a_frame_whose_rows_nobody_counted(self, client, job, out, noted):
        read = dd.read_parquet(job.folder)
        frame = pcm.map_partitions(noted, read, context=LLM, meta=META, batch_rows=8)
        noted.fail([1, 2])
        with pytest.raises(FailedRowsError, match="allows of 200"):
            write(frame, out, max_failed_share=0.005)

    def test_nothing_but_failures(self, client, claims, out, noted):
        frame = pcm.read_parquet(claims(n_files=40, n_rows=100))
        noted.fail(range(4000))
        verdicts = pcm.map_partitions(noted, frame, context=LLM, meta=META, batch_rows=10)
        for options in ({}, {"max_failed_share": 0.9}):
            with pytest.raises(ValueError, match="is bad") as raised:
                write(verdicts, out, **options, overwrite=True)
            assert not isinstance(raised.value, pcm.PCMError)
            last = traceback.extract_tb(raised.value.__traceback__)[-1]
            assert last.name == "infer"
            notes = "".join(raised.value.__notes__)
            assert "index 0: id=0, claim='claim 0'" in notes and "retry_failed=True" in notes
        report = pcm.attach(out).report
        assert report.state == "failed" and report.error == "ValueError: row 0 is bad"
        assert 30 <= report.rows == report.rows_failed < 4000
        noted.fail([])
        assert write(verdicts, out, retry_failed=True).report.rows_failed == 0

    @pytest.mark.parametrize("n_rows", [1, 12])
    def test_all_of_few_rows(self, client, claims, out, noted, n_rows):
        frame = pcm.read_parquet(claims(n_files=1, n_rows=n_rows))
        noted.fail(range(n_rows))
        verdicts = pcm.map_partitions(noted, frame, context=LLM, meta=META, batch_rows=8)
        with pytest.raises(ValueError, match="row 0 is bad"):
            write(verdicts, out)
        # Rows computed again do not count, nor does it where all may fail.
        assert write(verdicts, out, retry_failed=True).report.rows_failed == n_rows
        done = write(verdicts, out, max_failed_share=1, overwrite=True)
        assert done.report.rows_failed == n_rows

    def test_all_rows_of_a_frame_whose_rows_nobody_counted(self, client, job, out, noted):
        read = dd.read_parquet(job.folder)
        frame = pcm.map_partitions(noted, read, context=LLM, meta=META, batch_rows=8)
        noted.fail(range(200))
        with pytest.raises(ValueError, match="is bad"):
            write(frame, out)

    def test_bad_rows_late_in_the_input(self, client, job, out, noted):
        noted.fail(range(60, 200))
        assert write(job(noted), out).report.rows_failed == 140

    def test_what_has_succeeded_once_is_no_mistake_of_the_function(self, client, job, out, noted):
        """A run that goes on among bad rows."""
        noted.fail(range(50, 200))
        write(job(noted), out)
        for name in Output(Folder(out, "r")).parts():
            if int(name.split("-")[1]) >= 50:
                os.remove(f"{out}/{name}")
        assert write(job(noted), out).report.rows_failed == 150

    def test_a_function_behind_another_one(self, client, job, out, noted):
        """Where the first has answered, and the second fails on all that is left."""
        first = job()

        def second(f, model):
            raise KeyError("second")

        failing = pcm.map_partitions(
            second, first[first.error.isna()], context=LLM, meta=META, batch_rows=8
        )
        with pytest.raises(KeyError, match="second"):
            write(failing, out)

    def test_a_limit_that_is_none(self, client, job, out):
        with pytest.raises(pcm.PCMError, match="takes a number of rows"):
            write(job(), out, max_failed_rows="many")
        assert not os.path.exists(out)
