"""How long a job still has: asked of commands that say what Slurm's say."""

from __future__ import annotations

import signal
from datetime import datetime, timedelta

import pytest

from dask_pcm.plugins.time_left import UNKNOWN_S, time_left_s

JOB = {"SLURM_JOB_ID": "15"}


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Have a command print a text, or fail."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def say(command, text, code=0):
        path = tmp_path / command
        path.write_text(
            f"#!/bin/sh\necho \"$*\" > {path}.args\ncat <<'.'\n{text}\n.\nexit {code}\n"
        )
        path.chmod(0o755)
        return tmp_path / f"{command}.args"

    return say


def test_a_notice_ends_when_the_job_does(said):
    end = datetime.now() + timedelta(seconds=100)
    args = said("squeue", end.strftime("%Y-%m-%dT%H:%M:%S"))
    assert 90 < time_left_s(signal.SIGUSR1, JOB) <= 100
    assert args.read_text() == "--noheader --jobs=15 --format=%e\n"


def test_a_job_without_a_limit_has_the_grace_of_its_partition(said):
    said("squeue", "NONE")
    args = said("scontrol", "PartitionName=low\n   DisableRootJobs=NO GraceTime=50 Hidden=NO")
    assert 40 < time_left_s(signal.SIGUSR1, {**JOB, "SLURM_JOB_PARTITION": "low"}) <= 50
    assert args.read_text() == "show partition low\n"


def test_an_element_of_an_array_asks_for_itself(said):
    args = said("squeue", (datetime.now() + timedelta(seconds=50)).isoformat(timespec="seconds"))
    job = {**JOB, "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2"}
    assert 40 < time_left_s(signal.SIGUSR1, job) <= 50
    assert "--jobs=15_2" in args.read_text()


def test_after_sigterm_it_is_slurms_kill_wait(said):
    said("scontrol", "KeepAliveTime           = SYSTEM_DEFAULT\nKillWait                = 12 sec")
    assert time_left_s(signal.SIGTERM, JOB) == 12.0


@pytest.mark.parametrize(("text", "code"), [("N/A", 0), ("", 0), ("", 1)])
def test_where_slurm_does_not_say_it_is_assumed_and_said(said, text, code, caplog):
    said("squeue", text, code)
    said("scontrol", text, code)
    assert time_left_s(signal.SIGUSR1, JOB) == UNKNOWN_S
    assert "Slurm does not say when job 15 ends" in caplog.text
    assert time_left_s(signal.SIGTERM, JOB) == UNKNOWN_S


def test_without_slurm_nothing_is_asked():
    assert time_left_s(signal.SIGUSR1, {}) == UNKNOWN_S


@pytest.mark.parametrize("environ", [{"PBS_JOBID": "7.pbs"}, {"PCM_JOB_ID": "a.1"}])
def test_pbs_and_processes_of_this_machine_have_ten_seconds(environ):
    assert time_left_s(signal.SIGTERM, environ) == 10.0


@pytest.mark.parametrize(
    ("asked", "given", "seconds"),
    [("60", "10", 10.0), ("6", "600", 6.0), (None, "10", 10.0), ("a * 2", None, UNKNOWN_S)],
)
def test_under_htcondor_it_is_the_smaller_of_the_jobs_and_the_machines(
    tmp_path, asked, given, seconds
):
    job, machine = tmp_path / "job.ad", tmp_path / "machine.ad"
    job.write_text(f'Owner = "me"\nJobMaxVacateTime = {asked}\n' if asked else "")
    machine.write_text(f"MachineMaxVacateTime = {given}\nCpus = 1\n" if given else "")
    environ = {"_CONDOR_JOB_AD": str(job), "_CONDOR_MACHINE_AD": str(machine)}
    assert time_left_s(signal.SIGTERM, environ) == seconds
