"""Workers that were killed: how soon they are back, and as what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from tests.support.patience import patient, until

METHOD = "distributed.worker.multiprocessing-method"

pytestmark = pytest.mark.usefixtures("spawned")
#: Of transformers no more than a test asks for: it takes seconds.
IMPORTS = ["distributed", "pandas", "torch", "dask_pcm.plugins.worker.plugin"]


def about():
    names = ("torch", "transformers.modeling_utils", "dask_pcm.plugins.worker.plugin", "broken")
    imported = [name for name in names if name in sys.modules]
    return os.getpid(), imported, hash("a text"), os.environ.get("PCM_TEST_MARK")


def load():
    import torch

    return torch.nn.Linear(2, 2)


def use(context):
    with pcm.acquire(context) as module:
        return module.in_features


def killed(client):
    """Kill the only worker; what the next one is like."""
    pid, *_ = client.submit(about, pure=False).result(60)
    os.kill(pid, signal.SIGKILL)
    return client.submit(about, pure=False).result(60)


def test_a_killed_worker_is_back_with_everything_imported(monkeypatch):
    monkeypatch.setenv("PCM_TEST_MARK", "of then")
    monkeypatch.setitem(
        dask.config.config["pcm"]["worker"], "imports", [*IMPORTS, "transformers.modeling_utils"]
    )
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        pcm.install(client)
        client.submit(use, pcm.Context(load)).result(60)
        first = client.submit(about, pure=False).result(60)
        monkeypatch.setenv("PCM_TEST_MARK", "of later")
        pid, imported, a_hash, mark = killed(client)
        assert pid != first[0]
        assert imported == [
            "torch",
            "transformers.modeling_utils",
            "dask_pcm.plugins.worker.plugin",
        ]
        assert (a_hash, mark) == (first[2], "of then")
        # Another cluster of this process starts its workers as ever.
        with LocalCluster(**options) as plain, Client(plain, set_as_default=False) as other:
            _, imported, _, mark = other.submit(about).result(60)
            assert "torch" not in imported and mark == "of later"
        pcm.uninstall(client)
        _, imported, _, mark = killed(client)
        assert "torch" not in imported and mark == "of later"


def until_gone(pid):
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_the_fork_server_ends_with_the_last_cluster_that_uses_it():
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    options["preload_nanny"] = ["dask_pcm.preload"]
    servers = []
    for _ in range(2):
        with LocalCluster(**options) as one, Client(one) as client:
            server = client.submit(os.getppid).result(60)
            servers.append(server)
            assert server != os.getpid()
            with LocalCluster(**options) as other, Client(other, set_as_default=False) as second:
                assert second.submit(os.getppid).result(60) == server
            _, imported, *_ = killed(client)
            assert "torch" in imported
            assert client.submit(os.getppid, pure=False).result(60) == server
        until_gone(server)
    assert servers[0] != servers[1]


def test_after_uninstall_it_stays_for_as_long_as_its_workers():
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        pcm.install(client)
        client.submit(use, pcm.Context(load)).result(60)
        killed(client)
        server = client.submit(os.getppid, pure=False).result(60)
        pcm.uninstall(client)
        time.sleep(0.5)
        assert Path(f"/proc/{server}").exists()
        assert client.submit(os.getppid, pure=False).result(60) == server
        killed(client)
        until_gone(server)


def test_what_a_nanny_is_to_set_before_imports_is_set_before_imports():
    """Such workers are started as Dask does."""
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with (
        LocalCluster(**options, env={"PCM_TEST_MARK": "its own"}) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        client.submit(use, pcm.Context(load)).result(60)
        _, imported, _, mark = killed(client)
        assert "torch" not in imported and mark == "its own"


def test_a_method_that_somebody_has_chosen_stays():
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    options["preload_nanny"] = ["dask_pcm.preload"]
    with (
        dask.config.set({METHOD: "forkserver"}),
        LocalCluster(**options) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        assert dask.config.get(METHOD) == "forkserver"
        pcm.uninstall(client)
        assert dask.config.get(METHOD) == "forkserver"


def test_dask_worker_as_a_batch_job_starts_it(tmp_path):
    """Without `install`; and one of the imports raises what is no ImportError."""
    (tmp_path / "broken.py").write_text("raise RuntimeError('a driver is missing')")
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])]),
        "DASK_PCM__WORKER__IMPORTS": "['nowhere', 'broken', 'torch']",
    }
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, Client(cluster) as client:
        python = Path(sys.executable)
        command = [python.with_name("dask"), "worker", cluster.scheduler_address, "--no-dashboard"]
        command += ["--nthreads=1", "--preload-nanny=dask_pcm.preload"]
        with subprocess.Popen(command, env=environ, cwd=tmp_path) as job:
            try:
                client.wait_for_workers(1, timeout=patient(60))
                first = client.submit(about, pure=False).result(60)
                second = killed(client)
            finally:
                job.terminate()
        assert first[0] != second[0]
        assert first[1:] == second[1:]
        assert "torch" in first[1] and "broken" not in first[1]


def test_a_job_that_is_killed_leaves_no_fork_server(tmp_path):
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, Client(cluster) as client:
        command = [Path(sys.executable).with_name("dask"), "worker", cluster.scheduler_address]
        command += ["--no-dashboard", "--nthreads=1", "--preload-nanny=dask_pcm.preload"]
        environ = {**os.environ, "DASK_PCM__WORKER__IMPORTS": "['distributed']"}
        with subprocess.Popen(command, cwd=tmp_path, env=environ) as job:
            client.wait_for_workers(1, timeout=patient(60))
            parent = client.submit(os.getppid).result(60)
            assert parent != job.pid  # the server's
            job.kill()
        until_gone(parent)
