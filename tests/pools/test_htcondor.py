"""HTCondor: its submit files to the letter, and what its commands say."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.pools.batch import JobState, Start, scrubbed
from dask_pcm.pools.htcondor import HTCondor, script
from dask_pcm.pools.pool import pools_of

#: As in single quotes of ours within the double quotes of HTCondor.
PYTHON = shlex.quote(sys.executable).replace("'", "''")
#: What condor_q says where no schedd answers.
NO_SCHEDD = "Error: Can't find address of local schedd"


def begin(logs=Path("/logs"), tls=None, **pool):
    pool = pcm.Pool(**{"batch": "htcondor", "memory": "16 GiB", **pool})
    return Start("tls://10.0.0.1:8786", "a10", pool, tls or {}, logs)


def header(n_jobs=1, **pool):
    return script(begin(**pool), n_jobs).split("\nArguments")[0].splitlines()


def test_a_submit_file_of_three_jobs_with_two_gpus():
    start = begin(
        tls={"--tls-ca-file": "/home/my me/ca.pem"},
        account="lab",
        cores=4,
        walltime="90m",
        gpus_per_job=2,
        gpu_type="NVIDIA A10",
        device="NVIDIA A10",
        scratch="/scratch/me",
        directives=["request_disk = 20GB", '+Site = "lab"'],
        prologue=["module load cuda # the newest", "export A=$(hostname)"],
        worker_args=["--resources", "x=1"],
    )
    assert (
        script(start, 3)
        == f"""\
#!/usr/bin/env bash

batch_name = pcm-a10
accounting_group = lab
request_cpus = 4
request_memory = 16384MB
request_gpus = 2
require_gpus = DeviceName == "NVIDIA A10"
transfer_executable = False
output = /logs/pcm-a10-$(ClusterId).$(ProcId).out
stream_output = True
job_max_vacate_time = 60
periodic_remove = JobStatus == 2 && time() - EnteredCurrentStatus > 5340
request_disk = 20GB
+Site = "lab"

Arguments = "-c 'exec 2>&1; export PCM_JOB_ID=$(ClusterId).$(ProcId);\
 export DASK_PCM__WORKER__POOL=a10; export DASK_PCM__WORKER__DEVICE=''NVIDIA A10'';\
 export DASK_PCM__WORKER__WALLTIME=5400s; export DASK_PCM__WORKER__IMPORTS=''[]'';\
 eval ''module load cuda # the newest''; export A=$(DOLLAR)(hostname);\
 exec {PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name a10\
 --nthreads 4 --memory-limit 16.00GiB --death-timeout 60 --local-directory /scratch/me --pool a10\
 --workers 2 --tls-ca-file ''/home/my me/ca.pem'' --resources x=1'"
Executable = /bin/bash

Queue 3
"""
    )


def test_what_is_not_asked_for_is_not_in_the_submit_file():
    lines = header(mem="none")
    assert not [one for one in lines if "gpus" in one or "memory" in one or "disk" in one.lower()]
    assert not [one for one in lines if "accounting" in one or "periodic" in one or "Dask" in one]
    assert script(begin()).endswith("\nQueue 1\n")


@pytest.mark.parametrize("own", ["requirements = Site == 1 || x", "Requirements =Site == 1 || x"])
def test_excluded_nodes_are_part_of_a_users_requirements(own):
    start = replace(begin(), excluded=("n1.site", "n2"))
    bad = 'TARGET.Machine =!= "n1.site" && TARGET.Machine =!= "n2"'
    assert f"requirements = {bad}" in script(start).splitlines()
    start = replace(begin(directives=[own]), excluded=("n1.site", "n2"))
    (line,) = [one for one in script(start).splitlines() if one.lower().startswith("requirements")]
    assert line.partition("= ")[2] == f"(Site == 1 || x) && {bad}"


@pytest.mark.parametrize("own", ["request_gpus = 4", "RequestGpus=4", "request_GPUs   = 4"])
def test_a_directive_takes_the_place_of_ours(own):
    lines = header(gpus_per_job=1, directives=[own])
    assert [one for one in lines if "gpus" in one.lower()] == [
        f"{own.split('=')[0].strip()} = 4",
    ]


def test_the_notice_is_what_a_job_asks_for_and_part_of_its_walltime():
    assert "job_max_vacate_time = 20" in header(notice="20s")
    (line,) = [one for one in header(walltime="60s") if one.startswith("periodic_remove")]
    assert line.endswith("> 30")  # not at once, though the notice is as long as the walltime


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ({"nodes_per_job": 2}, "several nodes are built for Slurm only"),
        ({"queue": "gpu"}, "HTCondor has no queues"),
        ({"directives": ["--gres=gpu:1"]}, "'--gres=gpu:1' is no line of a submit file"),
        ({"directives": ["request_disk"]}, "'request_disk' is no line of a submit file"),
        ({"prologue": ["a\nb"]}, "a command of several lines"),
    ],
)
def test_what_htcondor_has_not_is_refused_in_words(pool, words):
    with pytest.raises(PoolError, match=words):
        script(begin(**pool))


def test_a_cluster_file_may_have_pools_of_htcondor(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("pools:\n  a10: {batch: htcondor, gpus_per_job: 1}\n")
    assert pools_of(path) == {"a10": pcm.Pool(batch="htcondor", gpus_per_job=1)}


def test_what_a_surrounding_job_has_set_is_not_passed_on():
    environ = {
        "_CONDOR_JOB_AD": "/x",
        "_CONDOR_SCRATCH_DIR": "/x",
        "_CONDOR_SLOT": "slot1",
        "_CONDOR_AssignedGPUs": "gpu0",
        "PCM_JOB_ID": "1.0",
    }
    kept = {"HOME": "/h", "_CONDOR_SCHEDD_HOST": "s", "CONDOR_CONFIG": "/c"}
    assert scrubbed({**environ, **kept}) == kept


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Have a command say what HTCondor's says, and keep what it was called with."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def say(command, text, code=0, error=""):
        path = tmp_path / command
        lines = ["#!/bin/sh", f'echo "$@" >> {path}.args', "cat <<'.'", text, "."]
        lines += ["cat >&2 <<'.'", error, ".", f"exit {code}"]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)
        return tmp_path / f"{command}.args"

    return say


def ad(job, status, **more):
    cluster, process = map(int, job.split("."))
    return {"ClusterId": cluster, "ProcId": process, "JobStatus": status, **more}


def test_one_query_says_what_became_of_all_jobs(says):
    why = "Error from slot1@n1: out of memory"
    ads = [
        ad("7.0", 1, LastRejMatchReason="no match found "),
        ad("7.1", 2, LastRejMatchReason="no match found "),
        ad("7.2", 3),
        ad("7.3", 4),
        ad("12.0", 5, HoldReason=why),
        ad("12.1", 6),
        ad("12.2", 7),
        ad("12.3", 5),
        ad("12.4", 2),  # not ours
    ]
    args = says("condor_q", json.dumps(ads))
    jobs = ["7.0", "7.1", "7.2", "7.3", "7.4", "12.0", "12.1", "12.2", "12.3"]
    assert asyncio.run(HTCondor().states(jobs)) == {
        "7.0": JobState(False, "no match found"),
        "7.1": JobState(True),
        "12.0": JobState(False, f"held: {why}"),
        "12.1": JobState(True),
        "12.2": JobState(True),
        "12.3": JobState(False, "held"),
    }
    assert args.read_text().startswith("7 12 -json -attributes ClusterId,ProcId,JobStatus,")
    assert len(args.read_text().splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[\n]"])
def test_an_empty_answer_says_that_all_are_over(says, text):
    says("condor_q", text)
    assert asyncio.run(HTCondor().states(["7.0"])) == {}


@pytest.mark.parametrize("text", ["[ {", "-- Failed to fetch ads", '{"a": 1}', "[1]"])
def test_an_answer_that_is_none_says_nothing_of_jobs(says, text):
    says("condor_q", text)
    with pytest.raises(PoolError, match=r"condor_q said .*; expected a list of jobs as JSON"):
        asyncio.run(HTCondor().states(["7.0"]))


def test_a_query_that_fails_says_nothing_of_jobs_in_its_own_words(says):
    says("condor_q", "", 1, NO_SCHEDD)
    with pytest.raises(PoolError, match=f"condor_q: {NO_SCHEDD}"):
        asyncio.run(HTCondor().states(["7.0"]))


def test_several_jobs_are_one_submission_unless_a_site_takes_none(says, tmp_path):
    args = says("condor_submit", "7.0 - 7.2")
    assert asyncio.run(HTCondor().submit(begin(tmp_path), 3)) == ["7.0", "7.1", "7.2"]
    assert args.read_text().startswith("-terse ") and len(args.read_text().splitlines()) == 1
    says("condor_submit", "7.0 - 7.0")
    args.unlink()
    single = begin(tmp_path, is_array=False)
    assert asyncio.run(HTCondor().submit(single, 2)) == ["7.0", "7.0"]
    assert len(args.read_text().splitlines()) == 2


def test_a_refused_submission_has_htcondors_own_words(says, tmp_path):
    says("condor_submit", "", 1, "ERROR: Failed to commit job submission into the queue.")
    with pytest.raises(PoolError, match="condor_submit: ERROR: Failed to commit"):
        asyncio.run(HTCondor().submit(begin(tmp_path), 3))
    says("condor_submit", "Submitting job(s)")
    with pytest.raises(PoolError, match="condor_submit said 'Submitting job"):
        asyncio.run(HTCondor().submit(begin(tmp_path), 3))


def test_what_was_submitted_before_a_refusal_is_known(says, tmp_path):
    begun, submit = tmp_path / "begun", tmp_path / "condor_submit"
    says("condor_submit", "")
    submit.write_text(f"#!/bin/sh\n[ -e {begun} ] && exit 1\ntouch {begun}\necho 7.0 - 7.0\n")
    single = begin(tmp_path, is_array=False)
    assert asyncio.run(HTCondor().submit(single, 3)) == ["7.0"]


def test_the_check_is_a_dry_run_and_a_question_to_the_queue(says, tmp_path):
    submitted, asked = says("condor_submit", ""), says("condor_q", "")
    asyncio.run(HTCondor().check(begin(tmp_path)))
    assert submitted.read_text().startswith("-dry-run /dev/null ")
    assert asked.read_text() == "-totals\n"
    says("condor_q", "", 1, NO_SCHEDD)
    with pytest.raises(PoolError, match=NO_SCHEDD):
        asyncio.run(HTCondor().check(begin(tmp_path)))


def test_single_jobs_are_cancelled_and_those_that_are_over_are_no_error(says):
    args = says("condor_rm", "", 1, "Job 7.1 not found\nJob 7.2 already marked for removal")
    asyncio.run(HTCondor().cancel(["7.1", "7.2"]))
    assert args.read_text() == "7.1 7.2\n"
    says("condor_rm", "", 1, "Job 7.1 not found\nPermission denied to remove job 7.2")
    with pytest.raises(PoolError, match="Permission denied"):
        asyncio.run(HTCondor().cancel(["7.1", "7.2"]))
    args.unlink()
    asyncio.run(HTCondor().cancel([]))
    assert not args.exists()


def test_a_machine_without_htcondor_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PoolError, match="condor_submit cannot be run on this machine"):
        asyncio.run(HTCondor().check(begin(tmp_path)))
