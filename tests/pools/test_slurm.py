"""The scripts of Slurm's jobs, to the letter."""

from __future__ import annotations

import asyncio
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import dask
import pytest

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.pools import slurm as slurm_module
from dask_pcm.pools.batch import Start, scrubbed
from dask_pcm.pools.slurm import Slurm, script

LAUNCHER = (
    f"exec {shlex.quote(sys.executable)} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name a10"
    " --nthreads 4 --memory-limit 16.00GiB --death-timeout 60"
)


def written(tls=None, **pool):
    start = Start("tls://10.0.0.1:8786", "a10", pcm.Pool(**pool), tls or {}, Path("/logs"))
    return script(start)


def test_a_script_of_a_job_with_two_gpus():
    tls = {"--tls-ca-file": "/home/my me/ca.pem"}
    assert (
        written(
            tls,
            queue="owners",
            account="lab",
            cores=4,
            memory="16 GiB",
            walltime="90m",
            gpus_per_job=2,
            gpu_type="a10",
            device="NVIDIA A10",
            scratch="/scratch/me",
            directives=["--constraint=ib"],
            prologue=["module load cuda"],
            worker_args=["--resources", "x=1"],
        )
        == f"""\
#!/usr/bin/env bash

#SBATCH -J pcm-a10
#SBATCH -p owners
#SBATCH -A lab
#SBATCH -n 1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH -t 01:30:00
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@60
#SBATCH --gres=gpu:a10:2
#SBATCH --constraint=ib
export DASK_PCM__WORKER__POOL=a10
export DASK_PCM__WORKER__DEVICE='NVIDIA A10'
export DASK_PCM__WORKER__WALLTIME=5400s
export DASK_PCM__WORKER__IMPORTS='[]'
module load cuda
{LAUNCHER} --local-directory /scratch/me --pool a10 --workers 2 --tls-ca-file '/home/my me/ca.pem'\
 --resources x=1
"""
    )


@pytest.mark.parametrize(
    ("pool", "has", "lacks"),
    [
        ({"mem": "none"}, [], ["mem"]),
        ({"mem": "per-cpu", "cores": 4}, ["--mem-per-cpu=1024M"], ["--mem="]),
        ({"mem": "per-gpu", "gpus_per_job": 2}, ["--mem-per-gpu=2048M"], ["--mem="]),
        ({"gpus_per_job": 1}, ["--gres=gpu:1"], []),
        ({"gpus_per_job": 1, "directives": ["--gpus-per-node=1"]}, [], ["--gres"]),
        (
            {"gpus_per_job": 1, "directives": ["--gres=gpu:b300:1"]},
            ["--gres=gpu:b300:1"],
            ["gpu:1"],
        ),
        ({"gpus_per_job": 1, "directives": ["-G 1"]}, [], ["--gres"]),
        (  # of two such lines, sbatch takes the last
            {"gpus_per_job": 1, "gpu_type": "a10", "directives": ["--gres=nvme:100", "--gres lic"]},
            ["--gres=gpu:a10:1,nvme:100,lic"],
            ["SBATCH --gres=nvme", "--gres lic"],
        ),
        ({"directives": ["--gres=nvme:100"]}, ["--gres=nvme:100"], ["gpu"]),
        ({"gpus_per_job": 1, "directives": ["--constraint=gpu80"]}, ["--gres=gpu:1"], []),
        ({"gpus_per_job": 1, "directives": ["--partition=gpu"]}, ["--gres=gpu:1"], []),
        ({"nodes_per_job": 2}, ["--nodes=2", "--ntasks-per-node=1"], ["SBATCH -n 1"]),
        ({"walltime": "60s"}, ["--signal=B:USR1@30"], []),  # not as the job begins
        ({}, [], ["--gres", "SBATCH -t", "SBATCH -p", "SBATCH -A", "WALLTIME"]),
    ],
)
def test_what_sites_ask_for_and_refuse(pool, has, lacks):
    header = written(memory="4 GiB", **pool).split(" -m dask_pcm")[0]
    assert all(f"#SBATCH {line}\n" in header for line in has)
    assert not any(text in header for text in lacks)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--clusters=other", "could not be followed"),
        ("-M other", "could not be followed"),
        ("-Mother", "could not be followed"),
        ("--requeue", "submits again what has ended"),
        ("--array=0-1", "how many jobs there are"),
        ("-a 0-1", "how many jobs there are"),
        ("--wait", "would wait"),
        ("-W", "would wait"),
        ("--nodes=2", "use nodes_per_job"),
    ],
)
def test_what_the_cluster_itself_decides_is_no_directive(option, why):
    with pytest.raises(PoolError, match=f"Leave the directive '{option}' out: .*{why}"):
        written(directives=[option])


def test_directives_that_begin_alike_are_kept():
    given = ["--wait-all-nodes=1", "--nodelist=n1", "--no-kill", "--account=me"]
    assert all(f"#SBATCH {one}\n" in written(directives=given) for one in given)


def test_a_job_of_several_nodes_has_a_launcher_on_each():
    srun = "exec srun --kill-on-bad-exit=0 --cpus-per-task=4"
    assert f"{srun} {shlex.quote(sys.executable)} -m" in written(nodes_per_job=2, cores=4)


def test_a_workers_share_of_ports_devices_and_disk():
    text = written(
        gpus_per_job=4,
        gpus_per_worker=2,
        device_memory="80 GB",
        ports="9000:9099",
        scratch='$TMPDIR/a "b" $(c) `d`',
    )
    assert "export DASK_PCM__WORKER__DEVICES=2\n" in text
    assert "export DASK_PCM__LADDER__DEVICE__BUDGET=144000000000\n" in text
    assert "export DASK_PCM__LADDER__TRANSFER__PORTS=9000:9099\n" in text
    assert " --worker-port 9000:9099 --nanny-port 9000:9099\n" in text
    # The shell fills in the variable, and runs no command.
    assert r' --local-directory "$TMPDIR/a \"b\" \$(c) \`d\`" ' in text


@pytest.mark.parametrize(
    "given",
    [["--resources", "GPU=1 foo=2"], ["--resources 'GPU=1 foo=2'"], ["--resources='GPU=1 foo=2'"]],
)
def test_options_of_workers_may_have_spaces(given):
    words = shlex.split(written(worker_args=given).splitlines()[-1])
    assert "GPU=1 foo=2" in " ".join(words[-2:]) and words[-1].endswith("GPU=1 foo=2")


def test_a_scratch_folder_in_the_home_of_the_node():
    assert ' --local-directory "$HOME/my scratch" ' in written(scratch="~/my scratch")


def test_what_a_surrounding_job_has_set_is_not_passed_on():
    environ = {
        "SLURM_MEM_PER_CPU": "1",
        "SBATCH_X": "1",
        "PBS_JOBID": "1",
        "SQUEUE_STATES": "R",
        "HOME": "/h",
    }
    kept = {"HOME": "/h", "SLURM_CONF": "/c", "PBS_SERVER": "s"}
    assert scrubbed({**environ, **kept}) == kept


def test_settings_that_somebody_has_reset_are_there_again(monkeypatch):
    before = written(memory="4 GiB")
    monkeypatch.delitem(dask.config.config, "jobqueue")
    assert written(memory="4 GiB") == before


@pytest.fixture
def busy(tmp_path, monkeypatch):
    """A Slurm whose ``sbatch`` gives up before it has an answer; it notes what was submitted."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_module, "_ASKED_S", 0.01)

    def say(command, *lines):
        path = tmp_path / command
        path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        path.chmod(0o755)

    timed_out = "sbatch: error: Batch job submission failed: Socket timed out on send/recv"
    say(
        "sbatch",
        f'for one; do :; done; echo "$one" >> {tmp_path}/submitted',
        f"echo {timed_out!r} >&2; exit 1",
    )
    return say


def submit(folder, n_jobs, **pool):
    start = Start("tls://10.0.0.1:8786", "a10", pcm.Pool(**pool), {}, folder)
    return asyncio.run(Slurm().submit(start, n_jobs))


@pytest.mark.parametrize("own", [["--exclude=n8,n9"], ["-x n8,n9"], []])
def test_excluded_nodes_come_on_top_of_a_users_own(busy, tmp_path, own):
    busy("sbatch", f'echo "$*" > {tmp_path}/args; echo 41')
    start = Start("tls://10.0.0.1:8786", "a10", pcm.Pool(directives=own), {}, tmp_path)
    assert asyncio.run(Slurm().submit(replace(start, excluded=("n1",)), 1)) == ["41"]
    (told,) = [
        one for one in (tmp_path / "args").read_text().split() if one.startswith("--exclude")
    ]
    assert told == ("--exclude=n8,n9,n1" if own else "--exclude=n1")


def test_a_job_that_a_busy_slurm_has_accepted_without_a_word_is_known(busy, tmp_path):
    others = "echo '7|/tmp/pcm-x/pcm-a10.sh'"
    # The first query fails, too, and in the second it is not there yet.
    busy(
        "squeue",
        f"echo x >> {tmp_path}/asked",
        f"n=$(wc -l < {tmp_path}/asked)",
        "[ $n = 1 ] && { echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1; }",
        others,
        f"[ $n = 2 ] || echo '41|'$(tail -n 1 {tmp_path}/submitted)",
    )
    assert submit(tmp_path, 3) == ["41_0", "41_1", "41_2"]
    assert len((tmp_path / "submitted").read_text().splitlines()) == 1  # not submitted again
    assert submit(tmp_path, 1) == ["41"]


def test_a_job_that_a_busy_slurm_has_not_accepted_is_refused_in_its_words(busy, tmp_path):
    busy("squeue", f"echo x >> {tmp_path}/asked", "echo '7|/tmp/pcm-x/pcm-a10.sh'")
    with pytest.raises(PoolError, match=r"sbatch: error: .* Socket timed out"):
        submit(tmp_path, 2)
    assert len((tmp_path / "asked").read_text().splitlines()) == 2
    busy("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(PoolError, match="Invalid account"):
        submit(tmp_path, 2)
    assert len((tmp_path / "asked").read_text().splitlines()) == 2  # there is nothing to ask
