"""PBS: its scripts to the letter, what its commands say, and the life of jobs through Slurm."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.pools.batch import JobState, Start
from dask_pcm.pools.pbs import PBS, script
from tests.support.patience import patient, until


def begin(logs=Path("/logs"), **pool):
    pool = pcm.Pool(**{"batch": "pbs", "memory": "16 GiB", **pool})
    return Start("tls://10.0.0.1:8786", "a10", pool, {}, logs)


def test_a_script_of_a_job_with_two_gpus():
    start = begin(queue="gpu", account="lab", cores=4, walltime="90m", gpus_per_job=2)
    assert (
        script(start)
        == f"""\
#!/usr/bin/env bash

#PBS -N pcm-a10
#PBS -q gpu
#PBS -A lab
#PBS -l select=1:ncpus=4:ngpus=2:mem=16384MB
#PBS -l walltime=01:30:00
#PBS -r n
#PBS -j oe
export DASK_PCM__WORKER__POOL=a10
export DASK_PCM__WORKER__WALLTIME=5400s
export DASK_PCM__WORKER__IMPORTS='[]'
exec {shlex.quote(sys.executable)} -m dask_pcm.pools.launcher tls://10.0.0.1:8786\
 --name a10 --nthreads 4 --memory-limit 16.00GiB --death-timeout 60 --pool a10 --workers 2
"""
    )


def test_a_select_of_the_sites_own_takes_the_place_of_ours():
    own = "-l select=1:ncpus=4:ngpus=1:gpu_type=a10"
    text = script(begin(directives=[own], gpu_type="a10", gpus_per_job=1))
    assert text.count("select=") == 1 and f"#PBS {own}\n" in text and "walltime" not in text
    with pytest.raises(PoolError, match="PBS has no common name for the GPU model"):
        script(begin(gpu_type="a10", gpus_per_job=1))
    with pytest.raises(PoolError, match="several nodes are built for Slurm only"):
        script(begin(nodes_per_job=2))
    assert "mem=" not in script(begin(mem="none"))


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Have a command say what PBS Pro's says, and keep what it was called with."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def say(command, text, code=0):
        path = tmp_path / command
        lines = ["#!/bin/sh", f'echo "$@" >> {path}.args', "cat <<'.'", text, ".", f"exit {code}"]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)
        return tmp_path / f"{command}.args"

    return say


QSTAT = """\
Job id            Name             User              Time Use S Queue
----------------  ---------------- ----------------  -------- - -----
100[].pbs-1       pcm-a10          me                       0 B gpu
100[0].pbs-1      pcm-a10          me                00:00:10 R gpu
100[1].pbs-1      pcm-a10          me                       0 Q gpu
100[2].pbs-1      pcm-a10          me                00:01:00 X gpu
101.pbs-1         pcm-a10          me                       0 H gpu
102.pbs-1         other            you               00:01:00 R gpu
103.pbs-1         pcm-a10          me                00:01:00 E gpu"""


def test_one_query_says_what_became_of_all_elements(says):
    args = says("qstat", QSTAT)
    jobs = ["100[0]", "100[1]", "100[2]", "101", "103", "104"]
    assert asyncio.run(PBS().states(jobs)) == {
        "100[0]": JobState(True),
        "100[1]": JobState(False),
        "101": JobState(False, "held"),
        "103": JobState(True, is_ending=True),
    }
    assert args.read_text() == "-t\n"


def test_several_jobs_are_one_array_unless_a_site_takes_none(says, tmp_path):
    args = says("qsub", "100[].pbs-1.site")
    ids = asyncio.run(PBS().submit(begin(tmp_path), 3))
    assert ids == ["100[0]", "100[1]", "100[2]"]
    assert args.read_text().startswith("-r y -J 0-2 ")
    says("qsub", "100.pbs-1.site")
    args.unlink()
    assert asyncio.run(PBS().submit(begin(tmp_path, is_array=False), 2)) == ["100", "100"]
    assert len(args.read_text().splitlines()) == 2 and "-J" not in args.read_text()


def test_what_was_submitted_before_a_refusal_is_known(says, tmp_path):
    begun = tmp_path / "begun"
    qsub = tmp_path / "qsub"
    says("qsub", "")
    qsub.write_text(f"#!/bin/sh\n[ -e {begun} ] && exit 1\ntouch {begun}\necho 100.pbs-1\n")
    assert asyncio.run(PBS().submit(begin(tmp_path, is_array=False), 3)) == ["100"]
    with pytest.raises(PoolError, match="qsub"):
        asyncio.run(PBS().submit(begin(tmp_path, is_array=False), 3))


def test_cancelled_jobs_that_are_over_already_are_no_error(says):
    args = says("qdel", "qdel: Unknown Job Id 100.pbs-1", 153)
    asyncio.run(PBS().cancel(["100", "100[1]"]))
    says("qdel", "qdel: Unauthorized Request 100.pbs-1", 159)
    args.unlink()
    with pytest.raises(PoolError, match="Unauthorized Request"):
        asyncio.run(PBS().cancel(["100", "101"]))
    assert args.read_text() == "100\n101\n"  # one that is refused leaves none uncancelled


@pytest.mark.skipif(
    shutil.which("qsub") is None,
    reason="no qsub: apt-get install -y --no-install-recommends slurm-wlm-torque",
)
def test_the_life_of_jobs_by_qsub_and_qdel(slurm, cluster):
    """Through Slurm's own commands of these names, which know no elements of arrays."""
    pool = pcm.Pool(batch="pbs", queue="opportunistic", memory="600 MiB", is_array=False)
    one = cluster({"cpu": pool})
    one.scale(2)
    one.wait_for_workers(2, timeout=patient(60))
    before = set(one._fleets["cpu"].jobs)
    subprocess.run(["qdel", min(before)], check=True)
    until(lambda: len(set(one._fleets["cpu"].jobs) - before) == 1)
    until(lambda: len(one.scheduler_info["workers"]) == 2)
    with pytest.raises(PoolError, match="invalid partition"):
        cluster({"cpu": pcm.Pool(batch="pbs", queue="nowhere")})
