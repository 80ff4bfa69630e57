"""A cluster of pools on a real HTCondor: submitted, evicted, held and removed jobs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time

import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from tests.support import condor
from tests.support.jobs import found_in
from tests.support.needs import lacking
from tests.support.patience import patient, until

#: What the fixture ``home`` sets, and what a machine of ``make test-condor`` gives an evicted job.
POLL_S, VACATE_S = 1.0, 10


@pytest.fixture(autouse=True)
def _condor():
    if why := condor.missing():
        lacking("condor", f"no HTCondor: {why}; make test-condor brings one")


def queue():
    """The jobs in the queue, by id."""
    said = subprocess.run(["condor_q", "-json"], check=True, capture_output=True, text=True).stdout
    ads = json.loads(said) if said.strip() else []
    return {f"{ad['ClusterId']}.{ad['ProcId']}": ad for ad in ads}


def told(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def names(cluster):
    return {str(w["name"]) for w in cluster.scheduler_info["workers"].values()}


def pool(**options):
    return pcm.Pool(**{"batch": "htcondor", "memory": "600 MiB", **options})


def test_jobs_go_as_one_submission_compute_a_run_and_end_with_the_cluster(cluster, job, tmp_path):
    one = cluster({"gpu": pool(gpus_per_job=1)})
    one.scale(2)
    with Client(one) as client:
        client.wait_for_workers(2, timeout=patient(60))
        ads = queue()
        assert sorted(ads) == sorted(one._fleets["gpu"].jobs)
        assert {ad["JobBatchName"] for ad in ads.values()} == {"pcm-gpu"}
        assert len({id_.split(".")[0] for id_ in ads}) == 1  # one submission
        assert names(one) == {f"gpu-{id_}" for id_ in ads}
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert len(set(seen.values())) == 2
        pids = list(client.run(os.getpid).values())
        run = pcm.write_parquet(job, tmp_path / "out", client=client, progress=False)
        assert sorted(found_in(tmp_path / "out").id) == list(range(400))
        assert run.report.rows_recomputed == 0
        one.scale(1)  # a single job of the submission
        until(lambda: len(names(one)) == 1 and len(queue()) == 1)
    one.close()
    until(lambda: not queue())
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_an_evicted_job_loses_nothing_and_comes_back_by_htcondors_queue(cluster, job, tmp_path):
    one = cluster({"cpu": pool()})
    one.scale(2)
    with Client(one) as client:
        client.wait_for_workers(2, timeout=patient(60))
        before = set(queue())
        run = pcm.write_parquet(job, tmp_path / "out", client=client, progress=False, wait=False)
        until(lambda: run.progress.done > 0)
        evicted = min(before)
        told("condor_vacate_job", evicted)
        begun = time.monotonic()
        log = one._jobs.log("cpu", evicted)
        left = until(lambda: re.search(r"ends in (\d+) s and drains", log.read_text()))
        assert int(left[1]) == VACATE_S
        until(lambda: f"cpu-{evicted}" not in names(one))
        gone_s = time.monotonic() - begun
        until(lambda: any(n.startswith(f"cpu-{evicted}-start") for n in names(one)), 60)
        print(f"evicted: gone after {gone_s:.1f} s, back after {time.monotonic() - begun:.1f} s")
        run.wait()
        assert sorted(found_in(tmp_path / "out").id) == list(range(400))
        assert run.report.rows_recomputed == 0
        assert set(queue()) == before == set(one._fleets["cpu"].jobs)


def test_a_job_that_is_removed_outside_is_replaced(cluster):
    one = cluster({"cpu": pool()})
    one.scale(2)
    one.wait_for_workers(2, timeout=patient(60))
    before = set(queue())
    told("condor_rm", min(before))
    begun = time.monotonic()
    (new,) = until(lambda: set(queue()) - before)
    took_s = time.monotonic() - begun
    print(f"removed: replaced after {took_s:.1f} s")
    assert took_s < patient(POLL_S + 5)
    until(lambda: names(one) == {f"cpu-{max(before)}", f"cpu-{new}"}, 60)


def test_a_hold_is_said_in_htcondors_words(cluster):
    one = cluster({"cpu": pool()})
    one.scale(1)
    one.wait_for_workers(1, timeout=patient(60))
    (held,) = queue()
    told("condor_hold", held)
    until(lambda: "1 pending (held: via condor_hold (by user" in one.lack)
    assert set(queue()) == {held}
    # Released while it is still being evicted, HTCondor 23.9 leaves it idle beside idle machines.
    until(lambda: not names(one) and "Claimed" not in told("condor_status", "-af", "State").split())
    told("condor_release", held)
    back = re.compile(rf"cpu-{re.escape(held)}-start\d+")  # an attempt to start it may fail
    until(lambda: [n for n in names(one) if back.fullmatch(n)], 60)
    one.close()
    until(lambda: not queue())


def test_a_job_that_no_machine_matches_waits_and_is_said(cluster):
    one = cluster({"gpu": pool(gpus_per_job=3)})
    one.scale(1)
    until(lambda: "1 pending (no match found)" in one.lack, 60)


def test_a_job_ends_with_its_walltime_and_is_replaced(cluster):
    one = cluster({"cpu": pool(walltime="30s", notice="15s")})
    one.scale(1)
    one.wait_for_workers(1, timeout=patient(60))
    (first,) = queue()
    until(lambda: set(queue()) - {first}, 60)
    until(lambda: any(not name.startswith(f"cpu-{first}") for name in names(one)), 60)


def test_a_submit_file_that_htcondor_cannot_read_is_refused_at_once(cluster):
    with pytest.raises(PoolError, match=r"(?s)condor_submit: .*RequestMemory = some of it"):
        cluster({"cpu": pool(directives=["request_memory = some of it"])})
    assert not queue()
