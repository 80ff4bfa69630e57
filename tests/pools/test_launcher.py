"""The process of a job: which devices its workers see, and what they are called."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import pytest

from dask_pcm.pools import launcher
from dask_pcm.pools.fleet import BAD_NODE
from dask_pcm.pools.launcher import answers, environments, job_id, node_of, start_number
from tests.support.patience import patient


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"SLURM_JOB_ID": "15"}, "15"),
        ({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0"),
        ({"PBS_JOBID": "123.pbs-1.site"}, "123"),
        ({"PBS_JOBID": "123[4].pbs-1.site", "PBS_ARRAY_INDEX": "4"}, "123[4]"),
        ({"PCM_JOB_ID": "7.1", "SLURM_JOB_ID": "15"}, "7.1"),
    ],
)
def test_a_job_is_called_as_its_batch_system_calls_it(environ, found):
    assert job_id(environ) == found


def test_a_job_that_htcondor_starts_again_is_known_by_its_number(tmp_path):
    ad = tmp_path / "job.ad"
    ad.write_text('NumJobStarts = 1\nNumShadowStarts = 2\nOwner = "me"\n')
    assert start_number({"_CONDOR_JOB_AD": str(ad)}) == 2
    assert start_number({}) == start_number({"_CONDOR_JOB_AD": "/none"}) == 1


def test_a_node_is_called_as_its_batch_system_calls_it(tmp_path):
    ad = tmp_path / "machine.ad"
    ad.write_text('Name = "slot1@n1.site"\nMachine = "n1.site"\nMyType = "Machine"\n')
    assert node_of({"_CONDOR_MACHINE_AD": str(ad)}) == "n1.site"
    assert node_of({"SLURMD_NODENAME": "n2"}) == "n2"
    assert node_of({}) == socket.gethostname()


def test_each_worker_sees_its_own_devices_whatever_they_are_called():
    environ = {"CUDA_VISIBLE_DEVICES": "0,GPU-8a2c,MIG-77,3", "ROCR_VISIBLE_DEVICES": "", "A": "b"}
    found = environments(environ, 2)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0,GPU-8a2c", "MIG-77,3"]
    assert all(one["A"] == "b" and one["ROCR_VISIBLE_DEVICES"] == "" for one in found)
    assert environments(environ, 1) == [environ]


def test_devices_that_the_batch_system_does_not_list_are_counted():
    counted = environments({"A": "b", "DASK_PCM__WORKER__DEVICES": "2"}, 2)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in counted] == ["0,1", "2,3"]
    assert environments({"A": "b"}, 1) == [{"A": "b"}]


def test_devices_that_cannot_be_divided_end_the_job_in_words():
    with pytest.raises(SystemExit, match=r"3 devices \(0, 1, 2\) for 2 workers. Set gpus_per_job"):
        environments({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 2)


@pytest.mark.parametrize(
    ("folder", "before", "said"),
    [
        ("file/scratch", "", "File exists|Not a directory"),
        ("small", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))", "large"),
        ("new/scratch", "", ""),
    ],
)
def test_a_job_ends_in_words_where_its_scratch_cannot_be_used(folder, before, said, tmp_path):
    (tmp_path / "file").touch()
    check = f"from dask_pcm.pools.launcher import check_scratch\n{before}\ncheck_scratch"
    code = f"{check}({str(tmp_path / folder)!r}, {{'SLURMD_NODENAME': 'n1'}})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if not said:
        assert ended.returncode == 0 and not list((tmp_path / folder).iterdir())
        return
    assert ended.returncode == 1
    found = BAD_NODE.fullmatch(ended.stderr.strip())
    assert found[1] == "n1" and str(tmp_path / folder) in found[2] and re.search(said, found[2])


def test_a_worker_that_is_started_again_has_what_is_left_of_the_jobs_time(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now[0])
    told = tmp_path / "told"
    command = ["/bin/sh", "-c", f"echo $DASK_PCM__WORKER__WALLTIME >> {told}"]
    worker = launcher._Worker(command, {"DASK_PCM__WORKER__WALLTIME": "5400s"})
    for now[0] in (100.0, 4000.0, 9000.0):
        worker.start()
        worker.process.wait()
    assert told.read_text().split() == ["5400s", "1500s", "1s"]


def test_workers_are_not_started_for_a_scheduler_that_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert answers(address)
    assert not answers(address) and not answers("nowhere")
    command = [
        sys.executable,
        "-m",
        "dask_pcm.pools.launcher",
        address,
        "--name",
        "a",
        "--pool",
        "a",
    ]
    command += ["--workers", "2", "--death-timeout", "1"]
    ended = subprocess.run(command, capture_output=True, timeout=patient(60), check=False)
    assert ended.returncode == 0
