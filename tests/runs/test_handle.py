"""Runs that people live with: looked at, paused, ended, taken over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import (
    BusyError,
    OutputError,
    RunCancelledError,
)
from dask_pcm.ledger.layout import MANIFEST
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.stash import stash
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.runs.identity import Manifest
from tests.support.jobs import LLM, META, found_in, verify, write
from tests.support.patience import patient, until


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
        with pytest.raises(RunCancelledError, match="was cancelled"):
            run.wait(patient(30))
        assert run.status == run.report.state == "cancelled"
        gate.open()
        assert pcm.attach(out).status == "cancelled"
        assert write(job(gate), out).report.rows == 200
        for ask in (run.pause, run.resume, run.cancel):
            with pytest.raises(OutputError, match=r"No run is at work.*run the same job again"):
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
        with pytest.raises(pcm.PCMError, match=r"driver of the run .* has died"):
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
