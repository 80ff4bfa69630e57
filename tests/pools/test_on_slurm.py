"""A cluster of pools on a real Slurm: submitted, preempted and cancelled jobs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.factcheck import PROMPT, generate
from tests.support.jobs import found_in
from tests.support.patience import patient, until
from tests.support.signals import heed_hangups
from tests.support.slurm import GRACE_S


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def queue(what="%i"):
    return said("squeue", "--noheader", "--array", "--states=PD,R", f"--format={what}")


def names(cluster):
    return {str(w["name"]) for w in cluster.scheduler_info["workers"].values()}


def pool(**options):
    return pcm.Pool(**{"queue": "opportunistic", "memory": "600 MiB", **options})


@pytest.fixture
def wrapped(tmp_path, monkeypatch):
    """Put shell lines in place of a command; ``{real}`` in them is the command itself."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def wrap(command, *lines):
        real, path = shutil.which(command), tmp_path / command
        text = "\n".join(["#!/bin/sh", *lines]) + "\n"
        path.write_text(text.replace("{real}", real))
        path.chmod(0o755)

    return wrap


def test_jobs_go_as_one_array_to_the_gpus_asked_for_and_end_with_the_cluster(slurm, cluster):
    one = cluster({"a10": pool(gpus_per_job=1, gpu_type="a10")})
    one.scale({"a10": 2})
    with Client(one) as client:
        client.wait_for_workers(2, timeout=patient(60))
        ids = queue()
        assert sorted(ids) == sorted(one._fleets["a10"].jobs)
        assert len({job.split("_")[0] for job in ids}) == 1  # one submission
        assert names(one) == {f"a10-{job}" for job in ids}
        assert set(queue("%N")) == {"a10n1", "a10n2"}
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert set(seen.values()) == {"0"}
        pids = list(client.run(os.getpid).values())
        one.scale({"a10": 1})
        until(lambda: len(names(one)) == 1 and len(queue()) == 1)
    one.close()
    until(lambda: not queue())
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_a_node_with_two_gpus_has_a_worker_on_each(slurm, cluster):
    one = cluster({"titan": pool(gpus_per_job=2, gpu_type="titanx", cores=2)})
    one.scale(2)
    with Client(one) as client:
        client.wait_for_workers(2, timeout=patient(60))
        assert len(queue()) == 1
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["0", "1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queue": "nowhere"}, "invalid partition"),
        ({"gpus_per_job": 1, "gpu_type": "b300"}, "(?i)requested node configuration"),
        ({"directives": ["--constraint=none"]}, "(?i)invalid feature"),
    ],
)
def test_what_the_site_does_not_have_is_refused_at_once_in_its_own_words(
    slurm, cluster, options, words
):
    begun = time.monotonic()
    with pytest.raises(PoolError, match=words):
        cluster({"gpu": pool(**options)})
    assert time.monotonic() - begun < patient(10)
    assert not queue()


def test_a_preempted_worker_is_replaced_at_its_notice_and_nothing_is_lost(
    slurm, cluster, job, tmp_path
):
    one = cluster({"h100": pool(gpus_per_job=1, gpu_type="h100"), "a10": pool()})
    one.scale({"h100": 1})
    with Client(one) as client:
        client.wait_for_workers(1, timeout=patient(60))
        (first,) = queue()
        run = pcm.write_parquet(job, tmp_path / "out", client=client, progress=False, wait=False)
        until(lambda: run.progress.done > 0)
        owner = [
            "sbatch",
            "--parsable",
            "-p",
            "owners",
            "--gres=gpu:h100:1",
            "--mem=100",
            "-o/dev/null",
        ]
        (theirs,) = said(*owner, "--wrap", f"sleep {patient(20)}")
        # A replacement is queued, and waits for the owner to leave.
        until(lambda: set(queue()) - {first, theirs})
        until(lambda: first not in queue() and theirs in queue("%i"))
        one.scale({"a10": 1})  # meanwhile others go on
        until(lambda: any(name.startswith("a10-") for name in names(one)))
        run.wait()
        found = found_in(tmp_path / "out")
        assert sorted(found.id) == list(range(400))
        assert run.report.rows_recomputed == 0
        # What the partition gives, not what is assumed where nothing is said.
        log = one._jobs.log("h100", first).read_text()
        (left,) = re.findall(r"ends in (\d+) s and drains", log)
        assert int(left) <= GRACE_S + 6, log
        subprocess.run(["scancel", theirs], check=True)
        until(lambda: any(name.startswith("h100-") for name in names(one)))


def test_a_node_without_its_scratch_folder_gets_no_jobs(slurm, cluster, tmp_path, caplog):
    (tmp_path / "a10n1").touch()  # a file, where the node's disk should be mounted
    scratch = {"scratch": "$SCRATCH", "prologue": [f"export SCRATCH={tmp_path}/$SLURMD_NODENAME"]}
    one = cluster({"a10": pool(gpus_per_job=1, gpu_type="a10", max_jobs=1, **scratch)})
    one.scale(1)
    with Client(one) as client:
        client.wait_for_workers(1, timeout=patient(60))
        until(lambda: queue("%N") == ["a10n2"])
        folder = next(iter(client.run(lambda dask_worker: dask_worker.local_directory).values()))
        assert folder.startswith(str(tmp_path / "a10n2"))
    text = f"Node a10n1 cannot be used: its scratch folder '{tmp_path}/a10n1'"
    assert caplog.text.count(text) == 1


def test_a_load_that_takes_longer_than_the_walltime_ends_the_run_with_the_numbers(
    slurm, cluster, claims, tmp_path
):
    def load():
        time.sleep(600)
        return "live"

    one = cluster({"a10": pool(walltime="1m", max_jobs=3)})
    one.scale(3)
    with Client(one) as client:
        frame = pcm.map_partitions(
            lambda frame, model: frame[["id"]],
            pcm.read_parquet(claims(n_files=1, n_rows=40)),
            context=pcm.Context(load),
            meta={"id": "i8"},
            batch_rows=4,
        )
        with pytest.raises(pcm.PCMError, match=r"'load' takes longer to load than .* walltime"):
            pcm.write_parquet(frame, tmp_path / "out", client=client, progress=False)


def test_jobs_that_slurm_has_accepted_without_a_word_belong_to_the_cluster(
    slurm, cluster, wrapped, tmp_path
):
    wrapped(
        "sbatch",
        f'{{real}} "$@" > {tmp_path}/said || exit',
        "case $1 in --test-only) exit;; esac",
        "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1",
    )
    one = cluster({"any": pool(gpus_per_job=1)})
    one.scale(2)
    one.wait_for_workers(2, timeout=patient(60))
    assert sorted(queue()) == sorted(one._fleets["any"].jobs)
    one.close()
    until(lambda: not queue())


def test_a_slurm_that_does_not_answer_is_said_and_no_job_counts_as_gone(
    slurm, cluster, wrapped, tmp_path
):
    is_down, error = tmp_path / "down", "slurm_load_jobs error: Unable to contact slurm controller"
    wrapped("squeue", f"[ -e {is_down} ] && {{ echo '{error}' >&2; exit 1; }}", 'exec {real} "$@"')
    one = cluster({"any": pool(gpus_per_job=1)})
    one.scale(1)
    one.wait_for_workers(1, timeout=patient(60))
    (job,) = one._fleets["any"].jobs
    is_down.touch()
    until(lambda: one.lack == f"waiting for jobs: slurm: squeue: {error}")
    assert list(one._fleets["any"].jobs) == [job]
    is_down.unlink()
    until(lambda: not one.lack)
    assert list(one._fleets["any"].jobs) == [job]


def test_jobs_that_no_query_has_ever_named_are_cancelled(slurm, cluster, wrapped):
    wrapped("squeue", "exit 0")  # as of another cluster of the site
    one = cluster({"any": pool(gpus_per_job=1)})
    one.scale(1)
    until(lambda: "3 times in a row" in one.lack)
    one.scale(0)
    until(lambda: not said(shutil.which("squeue", path="/usr/bin:/bin"), "--noheader"))


def test_jobs_whose_output_cannot_be_found_are_said(slurm, cluster, wrapped, caplog):
    elsewhere = "case $one in --output=*) one=--output=/dev/null;; esac"
    wrapped(
        "sbatch",
        f'for one; do shift; {elsewhere}; set -- "$@" "$one"; done',
        'exec {real} "$@"',
    )
    one = cluster({"any": pool(gpus_per_job=1, prologue=["exit 1"])})
    one.scale(1)
    until(lambda: "3 times in a row" in one.lack)
    folder = one._jobs.log("any", "1").parent
    until(lambda: f"there is none in {folder}: either it was cancelled" in caplog.text)


def test_the_next_cluster_cancels_what_a_killed_process_has_left_waiting(slurm, cluster, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import time, dask_pcm as pcm\n"
        "if __name__ == '__main__':\n"
        "    later = ['--begin=now+1hour']\n"
        "    pool = pcm.Pool(queue='opportunistic', memory='600 MiB', directives=later)\n"
        "    pcm.PoolCluster({'cpu': pool}).scale(2)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, script]) as process:
        until(lambda: len(queue()) == 2, 60)
        process.kill()
    assert len(queue()) == 2
    cluster({"other": pcm.Pool(batch="local")})
    until(lambda: not queue())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_a_session_ends_the_pending_jobs_of_a_command(slurm, tmp_path, number):
    generate(40, seed=3).to_parquet(tmp_path / "claims.parquet", index=False)
    path = tmp_path / "cluster.yaml"
    later = "{queue: opportunistic, memory: 600 MiB, directives: [--begin=now+1hour]}"
    path.write_text(f"pools: {{cpu: {later}}}")
    args = ["run", tmp_path / "claims.parquet", tmp_path / "out", "--cluster", path]
    args += ["--model", "demo", "--prompt", PROMPT, "--choices", "SUPPORTED,REFUTED"]
    command = [Path(sys.executable).with_name("dask-pcm"), *args]
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_hangups}
    with subprocess.Popen(list(map(str, command)), **options) as process:
        until(queue, 60)
        process.send_signal(number)
        _, text = process.communicate(timeout=patient(60))
    assert process.returncode == 130 and "rerun the same command to resume" in text
    assert "0/0" not in text
    until(lambda: not queue())


def test_a_pending_job_that_is_cancelled_outside_is_replaced(slurm, cluster):
    one = cluster({"h100": pool(gpus_per_job=1, gpu_type="h100")})
    one.scale(2)  # there is one
    one.wait_for_workers(1, timeout=patient(60))
    (waiting,) = said("squeue", "--noheader", "--array", "--states=PD", "--format=%i")
    until(lambda: "1 pending (" in one.lack and one.lack.startswith("waiting for jobs: h100:"))
    subprocess.run(["scancel", waiting], check=True)
    until(lambda: len(set(queue()) - {waiting}) == 2)
