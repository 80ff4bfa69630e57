"""A cluster of pools whose jobs are processes of this machine, killed and signalled for real."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
import urllib.request

import psutil
import pytest
from distributed import Client, Security

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.plugins.scheduler.plugin import GATE
from tests.support.jobs import found_in
from tests.support.patience import patient, until

LOCAL = {"cpu": pcm.Pool(batch="local")}


def names(cluster):
    return {str(w["name"]) for w in cluster.scheduler_info["workers"].values()}


def jobs(cluster, pool="cpu"):
    return cluster._fleets[pool].jobs


def process(cluster, job):
    """The process of a local job."""
    return psutil.Process(cluster._jobs._systems["local"]._jobs[job].pid)


def test_it_scales_by_pool_up_and_down_and_leaves_nothing(cluster, home):
    one = cluster({"small": {"batch": "local"}, "large": {"batch": "local", "cores": 2}})
    with pytest.raises(PoolError, match="does not say of which pool"):
        one.scale(3)
    with pytest.raises(PoolError, match="no pool 'huge'; there are small, large"):
        one.scale({"huge": 1})
    one.scale({"small": 2, "large": 1})
    with Client(one) as client:
        client.wait_for_workers(3, timeout=patient(60))
        threads = {w["name"]: w["nthreads"] for w in one.scheduler_info["workers"].values()}
        assert sorted(threads.values()) == [1, 1, 2]
        assert sum(name.startswith("small-") for name in threads) == 2
        one.scale({"small": 1})
        until(lambda: len(names(one)) == 2)
        assert {name.split("-")[0] for name in names(one)} == {"small", "large"}
        running = [process(one, job) for pool in ("small", "large") for job in jobs(one, pool)]
        html = one._repr_html_()
        assert "small" in html and "large" in html
    one.close()
    assert not any(one.is_running() for one in running)
    assert not list((home / "clusters").iterdir())


def test_a_job_that_is_killed_is_replaced_under_a_new_name(cluster):
    one = cluster()
    one.scale(1)
    one.wait_for_workers(1, timeout=patient(60))
    (before,) = names(one)
    (job,) = jobs(one)
    os.killpg(process(one, job).pid, signal.SIGKILL)
    until(lambda: names(one) and before not in names(one))
    assert len(jobs(one)) == 1


def test_workers_do_not_outlive_the_process_of_their_job(cluster):
    one = cluster({"cpu": pcm.Pool(batch="local", gpus_per_job=2, max_jobs=1)})
    one.scale(2)
    one.wait_for_workers(2, timeout=patient(60))
    (job,), before = jobs(one), names(one)
    process(one, job).kill()  # it alone: its workers go on
    until(lambda: not before & names(one))
    until(lambda: len(names(one)) == 2)


def test_a_job_under_notice_is_replaced_at_the_notice(cluster):
    def held(seconds):
        time.sleep(seconds)
        return os.getpid()

    notice = f"export DASK_PCM__WORKER__NOTICE={patient(20):.0f}s"
    one = cluster({"cpu": pcm.Pool(batch="local", prologue=[notice])})
    one.scale(1)
    with Client(one) as client:
        client.wait_for_workers(1, timeout=patient(60))
        (job,) = jobs(one)
        # Until its notice is over the worker works: the replacement is there before it is gone.
        working = client.submit(held, patient(8), pure=False)
        until(lambda: any(client.processing().values()))
        process(one, job).send_signal(signal.SIGUSR1)
        until(lambda: len(jobs(one)) == 2)
        assert not working.done()
        until(lambda: job not in jobs(one))
        assert working.result(timeout=patient(60))
        assert len(jobs(one)) == 1


def test_a_worker_that_is_given_back_ends_its_batches_and_is_no_loss_of_its_pool(
    cluster, job, tmp_path
):
    one = cluster()
    one.scale(2)
    with Client(one) as client:
        client.wait_for_workers(2, timeout=patient(60))
        run = pcm.write_parquet(job, tmp_path / "out", client=client, progress=False, wait=False)
        until(lambda: all(client.processing().values()))
        one.scale(0)
        until(lambda: not names(one))
        one.scale(2)
        run.wait()
        assert run.report.rows_recomputed == 0
        assert sorted(found_in(tmp_path / "out").id) == list(range(400))
        assert not one.scheduler.plugins[GATE].state.estimates.pools["cpu"].n_lost


def test_adaptive_follows_a_run_and_gives_back(cluster, job, tmp_path):
    one = cluster({"cpu": pcm.Pool(batch="local", idle_timeout="2s")})
    one.adapt(maximum={"cpu": 2}, target_duration="1s")

    with Client(one) as client:
        run = pcm.write_parquet(job, tmp_path / "out", client=client, progress=False, wait=False)
        until(lambda: len(names(one)) == 2)
        run.wait()
        assert len(found_in(tmp_path / "out")) == 400
        manifest = json.loads((tmp_path / "out/_pcm/manifest.json").read_text())
        assert manifest["recorded"]["connection_file"] == one.connection_file
        until(lambda: not jobs(one))


def test_a_maximum_of_all_holds_for_pools_alike(cluster, job, tmp_path):
    alike = {name: pcm.Pool(batch="local") for name in ("a", "b")}
    one = cluster(alike)
    one.adapt(maximum=2, target_duration="1s")
    n_workers, targets = set(), []
    with Client(one) as client:
        run = pcm.write_parquet(job, tmp_path / "out", client=client, progress=False, wait=False)
        while run.progress.done < 400:
            n_workers.add(len(names(one)))
            now = dict(one._wishes.targets)
            targets += [now] if not targets or targets[-1] != now else []
            time.sleep(0.1)
        run.wait()
    assert max(n_workers) == 2 and run.report.context_loads == 2
    assert len(targets) <= 4, targets  # none at first, what is wanted, and none at the end


def test_a_refused_submission_is_said_and_no_run_waits_without_a_word(cluster, tmp_path, caplog):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named dask_pcm >&2\nexit 1\n")
    python.chmod(0o755)
    one = cluster({"cpu": pcm.Pool(batch="local", python=str(python))})
    one.scale(1)
    until(lambda: "3 times in a row" in one.lack)
    until(lambda: "no module named dask_pcm" in caplog.text)  # said once the pool knows
    assert one.lack.startswith("waiting for jobs: cpu: 0 jobs with workers; jobs ended before")
    assert "output" not in one.lack  # which is in the log
    n_jobs = len(list(one._jobs.log("cpu", "x").parent.iterdir()))
    assert n_jobs == 3


def test_workers_that_accept_no_connections_are_refused_in_words(cluster, caplog):
    behind_nat = ["--listen-address", "tls://127.0.0.1:0"]
    behind_nat += ["--contact-address", "tls://127.0.0.1:1"]
    one = cluster({"cpu": pcm.Pool(batch="local", worker_args=behind_nat)})
    one.scale(1)
    until(lambda: "cannot be reached at tls://127.0.0.1:1 (" in one.lack)
    until(lambda: "these must not be behind NAT" in caplog.text)
    until(lambda: not jobs(one))


def test_an_interpreter_that_is_missing_is_refused_by_the_constructor(cluster, home):
    with pytest.raises(PoolError, match="'/no/python' cannot be run"):
        cluster({"cpu": pcm.Pool(batch="local", python="/no/python")})
    assert not list((home / "clusters").iterdir())


def test_only_this_user_can_connect_and_no_command_line_has_a_secret(cluster, caplog):
    one = cluster()
    one.scale(1)
    one.wait_for_workers(1, timeout=patient(60))
    file = one.connection_file
    folder = os.path.dirname(file)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    for name in os.listdir(folder):
        assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600
    assert one.scheduler_address.startswith("tls://")
    (job,) = jobs(one)
    for each in [process(one, job), *process(one, job).children(recursive=True)]:
        assert "PRIVATE KEY" not in " ".join([*each.cmdline(), *each.environ().values()])
    with pcm.connect(file) as client:
        assert client.submit(sum, [1, 2]).result() == 3
    assert "handshake" not in caplog.text  # the scheduler warns of those that fail
    key = os.path.join(folder, "key.pem")
    os.chmod(key, 0o644)
    with pytest.raises(PoolError, match="has mode 644"):
        pcm.connect(file)


def test_a_file_that_is_no_connection_file_is_refused(tmp_path):
    with pytest.raises(PoolError, match="There is no connection file"):
        pcm.connect(tmp_path / "gone.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(PoolError, match="is no connection file"):
        pcm.connect(tmp_path / "other.json")
    (tmp_path / "dask.json").write_text('{"type": "Scheduler", "address": "tcp://10.0.0.1:8786"}')
    with pytest.raises(PoolError, match="is a scheduler file of Dask's"):
        pcm.connect(tmp_path / "dask.json")


def test_each_worker_of_a_job_sees_its_own_device_and_is_started_again(cluster):
    prologue = ["export CUDA_VISIBLE_DEVICES=0,GPU-b"]
    one = cluster({"gpu": pcm.Pool(batch="local", gpus_per_job=2, prologue=prologue)})
    one.scale(2)
    with Client(one) as client:
        client.wait_for_workers(2, timeout=patient(60))
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["0", "GPU-b"]
        (job,) = jobs(one, "gpu")
        assert names(one) == {f"gpu-{job}-0", f"gpu-{job}-1"}
        victim = process(one, job).children()[0]
        victim.kill()  # a nanny; the launcher starts it again, in the same job
        until(lambda: victim.pid not in {c.pid for c in process(one, job).children()})
        until(lambda: len(process(one, job).children()) == 2 and len(names(one)) == 2)
        assert job in jobs(one, "gpu")


def test_a_pool_that_gives_nothing_leaves_the_work_to_others(cluster, tmp_path, claims):
    bad = tmp_path / "python"
    bad.write_text("#!/bin/sh\nexit 1\n")
    bad.chmod(0o755)
    pools = {"bad": pcm.Pool(batch="local", python=str(bad)), "good": pcm.Pool(batch="local")}
    one = cluster(pools)
    one.adapt(maximum=1, target_duration="1s")
    with Client(one) as client:
        frame = pcm.map_partitions(
            lambda frame, model: frame[["id"]],
            pcm.read_parquet(claims(n_files=1, n_rows=40)),
            context=pcm.Context(dict, [("a", 1)]),
            meta={"id": "i8"},
            batch_rows=4,
        )
        pcm.write_parquet(frame, tmp_path / "out", client=client, progress=False)
        assert len(found_in(tmp_path / "out")) == 40


def test_a_refused_constructor_leaves_no_thread_and_no_folder(home):
    before = threading.active_count()
    for options in ({}, {"security": "x"}, {"security": Security()}):
        with pytest.raises(PoolError):
            pcm.PoolCluster({"cpu": pcm.Pool(batch="local", python="/no/python")}, **options)
    until(lambda: threading.active_count() <= before)
    assert not list((home / "clusters").iterdir())


def test_the_link_of_the_dashboard_leads_there(cluster):
    link = cluster(name="../odd name").dashboard_link
    assert link.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(link, timeout=patient(10)) as answer:
        assert answer.status == 200


def test_another_machine_is_told_how_to_reach_the_dashboard(cluster, monkeypatch):
    one = cluster()
    port = one.dashboard_link.rpartition(":")[2].split("/")[0]
    command = f"ssh -N -L {port}:127.0.0.1:{port} "
    assert one.dashboard_tunnel.startswith(command)
    for text in (repr(one), one._repr_html_()):
        assert command in text and one.dashboard_link in text
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ann/")
    assert one.dashboard_link == f"/user/ann/proxy/{port}/status"
    assert one.dashboard_tunnel == ""
    for text in (repr(one), one._repr_html_()):
        assert "ssh" not in text and one.dashboard_link in text
    everywhere = cluster(dashboard_address=":0")
    assert everywhere.dashboard_tunnel == "" and "proxy" not in everywhere.dashboard_link


def test_scheduler_and_workers_listen_on_the_ports_that_are_open(cluster):
    one = cluster({"cpu": pcm.Pool(batch="local", ports="29000:29019")}, port="28900:28919")
    assert 28900 <= int(one.scheduler_address.rpartition(":")[2]) <= 28919
    one.scale(2)
    with Client(one) as client:
        client.wait_for_workers(2, timeout=patient(60))
        found = client.run(lambda dask_worker: dask_worker.plugins["pcm-contexts"].config.ports)
        assert set(found.values()) == {tuple(range(29000, 29020))}
    workers = one.scheduler_info["workers"]
    addresses = [*workers, *(worker["nanny"] for worker in workers.values())]
    ports = {int(address.rpartition(":")[2]) for address in addresses}
    assert len(ports) == 4 and ports <= set(range(29000, 29020))


def test_the_handler_of_interrupts_stays(cluster):
    before = signal.getsignal(signal.SIGINT)
    cluster()
    assert signal.getsignal(signal.SIGINT) is before
