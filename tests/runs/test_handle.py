"""Runs that people live with: looked at, paused, ended, extended, mended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
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
    CancelledError,
    FailedRowsError,
    InputError,
    OutputError,
    SchemaError,
)
from dask_pcm.ledger.layout import MANIFEST
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.stash import stash
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.identity import Manifest
from tests.support.patience import patient, until

META = {"id": "i8", "verdict": "str"}


def load(name="model"):
    return name


LLM = pcm.Context(load)


def verify(frame, model):
    return pd.DataFrame({"id": frame["id"], "verdict": model + frame["claim"]}, index=frame.index)


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "verdicts")


@pytest.fixture
def noted(tmp_path):
    """A function that notes its rows and fails on those named in a file; ``noted.ids()``."""
    log, bad = str(tmp_path / "computed"), str(tmp_path / "bad")
    Path(bad).write_text("")

    def infer(frame, model):
        failing = set(map(int, Path(bad).read_text().split()))
        if len(frame) == 1 and frame["id"].iloc[0] in failing:
            raise ValueError(f"row {frame['id'].iloc[0]} is bad")
        if failing & set(frame["id"]):
            raise ValueError("some row is bad")
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (" ".join(map(str, frame["id"])) + "\n").encode())
        os.close(descriptor)
        return verify(frame, model)

    def ids():
        text = Path(log).read_text() if os.path.exists(log) else ""
        Path(log).unlink(missing_ok=True)
        return sorted(map(int, text.split()))

    infer.ids = ids
    infer.fail = lambda rows: Path(bad).write_text(" ".join(map(str, rows)))
    return infer


class Gatekeeper:
    """A function that waits until it is let through, file by file."""

    def __init__(self, path):
        self.path = str(path)

    def __call__(self, frame, model):
        while not os.path.exists(self.path):
            time.sleep(0.01)
        return verify(frame, model)

    def open(self):
        Path(self.path).write_text("")


@pytest.fixture
def gate(tmp_path):
    return Gatekeeper(tmp_path / "go")


@pytest.fixture
def job(claims):
    folder = claims()

    def make(func=verify, batch_rows=8, keep=None, **options):
        frame = pcm.read_parquet(folder, **options)
        verdicts = pcm.map_partitions(func, frame, context=LLM, meta=META, batch_rows=batch_rows)
        return verdicts if keep is None else verdicts[keep(verdicts)]

    make.folder = folder
    return make


def write(frame, out, **options):
    return pcm.write_parquet(frame, out, **{"progress": False, **options})


def found_in(out):
    return pd.read_parquet(out).sort_values("id", ignore_index=True)


def note_in(part):
    return json.loads(pq.read_metadata(part).metadata[b"dask_pcm"])


class TestHandle:
    def test_after_its_end_its_figures_stand_still(self, client, job, out):
        run = write(job(), out)
        first = run.progress
        time.sleep(0.3)
        assert run.progress == first and first.per_s > 0

    def test_what_dask_has_computed_for_it_is_let_go(self, client, claims, out):
        """Also while somebody keeps the handle."""
        frame = dd.read_parquet(claims()).shuffle("id", npartitions=4)
        verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META)
        run = write(verdicts, out)
        until(lambda: not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))
        assert run.report.rows == 200

    def test_a_run_taken_over_that_was_about_to_overwrite(self, client, job, out, gate):
        """Begun anew for nobody yet: whoever takes over overwrites; nobody's rows are mixed."""
        write(job(), out)

        def other(frame, model):
            return verify(frame, "other ")

        def waiting(name):
            while not os.path.exists(name):
                time.sleep(0.01)
            return name

        slow = pcm.Context(waiting, gate.path)
        frame = pcm.read_parquet(job.folder)
        verdicts = pcm.map_partitions(other, frame, context=slow, meta=META, batch_rows=8)
        first = write(verdicts, out, overwrite=True, wait=False)
        until(lambda: first.status == "running")
        second = write(verdicts, out, take_over=True, wait=False)
        until(lambda: second.status == "running")
        gate.open()
        assert second.wait(patient(30)).rows_resumed == 0
        with pytest.raises(pcm.PCMError, match="replaced by a newer one"):
            first.wait(patient(30))
        assert found_in(out).verdict.str.startswith("other ").all() and len(found_in(out)) == 200
        assert write(verdicts, out).report.rows_resumed == 200

    def test_it_returns_at_once_and_is_waited_for(self, client, job, out, gate):
        run = write(job(gate), out, wait=False)
        assert run.status in ("starting", "running") and run.progress.total == 200
        until(lambda: run.status == "running")
        with pytest.raises(TimeoutError, match=r"goes on: running: 0/200 rows"):
            run.wait(0.1)
        gate.open()
        report = run.wait(patient(30))
        assert (report.state, report.rows) == ("finished", 200)
        assert run.status == "finished" and run.progress.done == 200
        assert repr(run).startswith(f"<Run {out!r}: 200 rows, 0 failed")
        assert found_in(out).id.tolist() == list(range(200))
        attached = pcm.attach(out)
        shutil.rmtree(out)  # what is shown was seen before
        assert repr(attached).startswith(f"<Run {out!r}: finished: 200/200 rows")

    def test_pause_resume(self, client, job, out, gate):
        run = write(job(gate), out, wait=False)
        until(lambda: any(client.processing().values()))
        run.pause()
        until(lambda: run.status == "paused")
        gate.open()
        until(lambda: len(found_in(out)))  # what workers have is finished
        until(lambda: not any(client.processing().values()))
        before = len(found_in(out))
        until(lambda: run.progress.done == before)
        assert before < 200  # what workers had at first; nothing came after it
        per_s = run.progress.per_s
        time.sleep(0.6)
        assert run.progress.done == before and run.progress.per_s == per_s
        run.resume()
        assert run.wait(patient(30)).rows == 200

    def test_cancel_and_go_on(self, client, job, out, gate):
        run = write(job(gate), out, wait=False)
        run.cancel()
        with pytest.raises(CancelledError, match="was cancelled"):
            run.wait(patient(30))
        assert run.status == run.report.state == "cancelled"
        gate.open()
        assert pcm.attach(out).status == "cancelled"
        assert write(job(gate), out).report.rows == 200
        for ask in (run.pause, run.resume, run.cancel):
            with pytest.raises(OutputError, match=r"Nobody is at work.*run the same job again"):
                ask()

    def test_what_fails_is_raised_by_wait_and_told_by_attach(self, client, job, out):
        def short(frame, model):
            return verify(frame, model).iloc[:-1]

        run = write(job(short), out, wait=False)
        with pytest.raises(pcm.PCMError, match="returned 7"):
            run.wait(patient(30))
        assert run.status == "failed" and "returned 7" in run.report.error
        with pytest.raises(pcm.PCMError, match="returned 7"):
            pcm.attach(out).wait(5)

    def test_what_is_wrong_is_raised_at_once_all_the_same(self, client, job, out):
        write(job(), out)
        with pytest.raises(OutputError, match="of another job"):
            write(job(lambda f, m: f), out, wait=False)

    def test_a_blocking_run_has_the_same_handle(self, client, job, out):
        run = write(job(), out)
        assert run.status == "finished" and run.wait().rows == 200
        assert run.progress.counted == "rows"


ATTACHED = """
import sys, json, dask_pcm as pcm
run = pcm.attach(sys.argv[1])
print(json.dumps({"status": run.status, "driver": run.driver, **run.progress.as_dict()}))
"""


def attached(out):
    """What another process sees."""
    done = subprocess.run(
        [sys.executable, "-c", ATTACHED, out], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


class TestAttach:
    def test_from_another_process(self, client, job, out, gate):
        run = write(job(gate), out, wait=False)
        until(lambda: pcm.attach(out).status == "running")
        seen = attached(out)
        assert (seen["status"], seen["total"]) == ("running", 200)
        assert f"process {os.getpid()} of" in seen["driver"]
        other = pcm.attach(out)
        waiting = threading.Thread(target=other.wait, args=(30,))
        waiting.start()
        gate.open()
        run.wait(patient(30))
        waiting.join(30)
        assert not waiting.is_alive()
        seen = attached(out)
        assert (seen["status"], seen["done"], seen["driver"]) == ("finished", 200, "")
        assert pcm.attach(out).report.rows == 200

    def test_of_a_run_whose_driver_died(self, claims, tmp_path, out):
        folder, log = claims(n_files=20), str(tmp_path / "log")
        command = [sys.executable, "-m", "tests.support.driver", folder, log, out]
        driver = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        until(lambda: os.path.exists(out) and len(list(Path(out).glob("*.parquet"))) > 4)
        os.killpg(driver.pid, 9)
        driver.wait()
        run = pcm.attach(out)
        assert run.status == "interrupted"
        assert 0 < run.progress.done < run.progress.total == 1000
        assert run.progress.done == len(pd.read_parquet(out))
        with pytest.raises(pcm.PCMError, match=r"Whoever drove the run .* is gone"):
            run.wait(5)

    def test_of_nothing(self, tmp_path):
        with pytest.raises(OutputError, match="no output of dask_pcm at"):
            pcm.attach(tmp_path)

    def test_of_a_frame_whose_rows_nobody_counted(self, client, job, out):
        frame = dd.read_parquet(job.folder)
        write(pcm.map_partitions(verify, frame, context=LLM, meta=META), out)
        progress = pcm.attach(out).progress
        assert (progress.counted, progress.done, progress.total) == ("parts", 4, 4)


class TestTwoDrivers:
    def test_the_second_is_told_who_is_at_work(self, client, job, out, gate):
        run = write(job(gate), out, wait=False)
        with pytest.raises(BusyError, match=rf"process {os.getpid()} of .* on .*pcm\.attach"):
            write(job(gate), out)
        gate.open()
        assert run.wait(patient(30)).rows == 200

    def test_the_second_may_shut_the_first_out(self, client, job, out, gate):
        first = write(job(gate), out, wait=False)
        second = write(job(gate), out, wait=False, take_over=True)
        gate.open()
        with pytest.raises(pcm.PCMError, match="replaced by a newer one"):
            first.wait(patient(30))
        assert second.wait(patient(30)).rows == 200
        assert found_in(out).id.tolist() == list(range(200))

    def test_another_job_cannot_take_over(self, client, job, out, gate):
        first = write(job(gate), out, wait=False)
        with pytest.raises(OutputError, match="of another job"):
            write(job(), out, take_over=True)
        gate.open()
        assert first.wait(patient(30)).rows == 200


class TestKilledOverwrite:
    @pytest.mark.parametrize("step", ["amid setting aside", "after the manifest"])
    def test_the_old_job_goes_on_as_if_nothing_had_been(self, client, job, out, step):
        """Through the same call, with nothing computed again."""
        write(job(), out)
        killed = Output(Folder(out, "killed"))
        with killed.storage.fence.takeover_lock(), killed.storage.fence.open_run({"pid": 1}):
            if step == "amid setting aside":
                for name in (MANIFEST, *list(killed.parts())[:2]):
                    killed.storage.move(name, f"{killed.run_dir}/aside/{name}")
            else:
                stash(killed)
                Manifest({"another": "job"}).write(killed)
            left = Path(out, killed.run_dir)
            shutil.copytree(left, f"{out}-left")  # as a kill leaves it
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(f"{out}-left", left)
        run = write(job(), out)
        assert (run.report.units, run.report.rows_resumed) == (0, 200)
        assert found_in(out).id.tolist() == list(range(200))


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
        with pytest.raises(OutputError, match=r"input has '.*part-2\.parquet', which is not in"):
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
        with contextlib.suppress(CancelledError):
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
        assert write(job(noted), out, max_failed_rows=0.01).report.rows_failed == 2
        with pytest.raises(FailedRowsError, match=r"max_failed_rows=0\.005 allows of 200"):
            write(job(noted), out, max_failed_rows="0.5%")

    def test_a_share_says_nothing_before_1000_rows(self, client, claims, out, noted):
        """Half of all rows fail, too many at any time: it is looked at once there are 1,000."""

        def half(f, model):
            errors = [None if i % 2 else "even" for i in f["id"]]
            return verify(f, model).assign(error=errors)

        frame = pcm.read_parquet(claims(n_files=40, n_rows=100))
        verdicts = pcm.map_partitions(half, frame, context=LLM, meta=META, batch_rows=20)
        with pytest.raises(FailedRowsError, match=r"=0\.3 allows of [1-3],\d\d\d; .* to be done"):
            write(verdicts, out, max_failed_rows="30%")

    def test_of_a_frame_whose_rows_nobody_counted(self, client, job, out, noted):
        read = dd.read_parquet(job.folder)
        frame = pcm.map_partitions(noted, read, context=LLM, meta=META, batch_rows=8)
        noted.fail([1, 2])
        with pytest.raises(FailedRowsError, match="allows of 200"):
            write(frame, out, max_failed_rows=0.005)

    def test_nothing_but_failures(self, client, claims, out, noted):
        frame = pcm.read_parquet(claims(n_files=40, n_rows=100))
        noted.fail(range(4000))
        verdicts = pcm.map_partitions(noted, frame, context=LLM, meta=META, batch_rows=10)
        for options in ({}, {"max_failed_rows": "90%"}):
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
        done = write(verdicts, out, max_failed_rows="100%", overwrite=True)
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
        with pytest.raises(pcm.PCMError, match="takes a number of rows or a share"):
            write(job(), out, max_failed_rows="many")
        assert not os.path.exists(out)


class TestSample:
    def test_where_every_row_fails_alike(self, client, job, out, noted):
        noted.fail(range(200))
        with pytest.raises(ValueError, match="is bad"):
            write(job(noted), out, sample=20)
        noted.fail(range(150))
        assert 0 < write(job(noted), out, sample=20).n_failed < 20

    def test_rows_of_the_whole_and_what_the_rest_would_take(self, client, job, out, noted):
        found = write(job(noted), out, sample=20)
        assert len(found.frame) == 20 and found.frame.id.is_monotonic_increasing
        assert found.frame.id.max() > 100 and noted.ids() == found.frame.id.tolist()
        assert (found.n_rows, found.n_left, found.n_failed) == (200, 200, 0)
        assert found.device_hours == pytest.approx(200 / found.rows_per_s / 3600)
        assert "20 of 200 rows" in str(found)
        assert not os.path.exists(out)
        assert write(job(noted), out, sample=20).frame.id.tolist() == found.frame.id.tolist()

    def test_of_what_is_begun(self, client, job, out, noted):
        noted.fail([5])
        write(job(noted), out)
        sorted(Path(out).glob("part-*.parquet"))[-1].unlink()
        n_left = 200 - len(pd.read_parquet(out))
        before = sorted(p.name for p in Path(out).rglob("*"))
        found = write(job(noted), out, sample=1000)
        assert (len(found.frame), found.n_left, found.n_failed) == (200, n_left, 1)
        assert found.errors == ("ValueError: row 5 is bad",)
        assert sorted(p.name for p in Path(out).rglob("*")) == before

    def test_what_cannot_be_sampled(self, client, job, out):
        with pytest.raises(SchemaError, match="rows that can be computed apart"):
            write(job(batch_rows=None), out, sample=5)
        with pytest.raises(SchemaError, match="at least 1 row"):
            write(job(), out, sample=0)
        write(job(), out)
        with pytest.raises(OutputError, match="of another job"):
            write(job(lambda f, m: f), out, sample=5)


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
        with pytest.raises(OutputError, match="gives other answers than the one that began it"):
            write(job(), out)


class TestObjectStore:
    @pytest.fixture
    def s3_client(self, object_store):
        """Workers that know the store: they take its address from the environment."""
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            yield client

    @pytest.mark.parametrize("has_locks", [False, True])
    def test_from_a_store_to_a_store(self, s3_client, bucket, claims, tmp_path, noted, has_locks):
        import s3fs

        fs = s3fs.S3FileSystem()
        fs.put(claims(), f"{bucket}/claims", recursive=True)
        locks = {"lock_folder": tmp_path / "locks"} if has_locks else {}
        out = f"{bucket}/verdicts"

        def job(name="model"):
            read = pcm.read_parquet(f"{bucket}/claims")
            context = pcm.Context(load, name)
            return pcm.map_partitions(noted, read, context=context, meta=META, batch_rows=8)

        noted.fail([7])
        run = write(job(), out, **locks)
        assert (run.report.rows, run.report.rows_failed) == (200, 1)
        how = f"lock files in {tmp_path / 'locks'}" if has_locks else "conditional put"
        assert run.report.committed_by == how
        assert found_in(out).id.tolist() == list(range(200))
        noted.ids()
        assert write(job(), out, **locks).report.units == 0
        fs.rm(sorted(fs.glob(f"{bucket}/verdicts/part-*.parquet"))[2])
        again = write(job(), out, **locks)
        assert len(noted.ids()) == 200 - again.report.rows_resumed > 0
        noted.fail([])
        assert write(job(), out, retry_failed=True, **locks).report.rows_failed == 0
        assert pcm.attach(out).status == "finished"
        with pytest.raises(OutputError, match="of another job"):
            write(job("other"), out, **locks)
        assert write(job("other"), out, overwrite=True, **locks).report.rows == 200
        assert found_in(out).verdict[0] == "otherclaim 0"
        left = [path.rpartition("/")[2] for path in fs.ls(f"{bucket}/verdicts/_pcm")]
        kept = [name for name in left if not name.startswith("lock-")]
        assert sorted(kept) == ["log", "manifest.json", "report.json"] and len(left) <= 4

    def test_an_output_within_its_input_is_refused(self, s3_client, bucket, claims):
        import s3fs

        s3fs.S3FileSystem().put(claims(), f"{bucket}/claims", recursive=True)
        read = pcm.read_parquet(f"{bucket}/claims")
        verdicts = pcm.map_partitions(verify, read, context=LLM, meta=META, batch_rows=8)
        with pytest.raises(OutputError, match="lie in each other"):
            write(verdicts, f"{bucket}/claims")


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
