"""Worker and nanny plugins in real processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster, wait

import dask_pcm as pcm
from dask_pcm.errors import InstallError
from dask_pcm.ladder.store import Store
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.plugins.worker.task import hold
from tests.support.patience import patient

# By its name: the package re-exports the function under the same one.
install_module = importlib.import_module("dask_pcm.plugins.install")


def load():
    return "live"


def use(i, ctx):
    with hold([ctx.ref]) as (value,):
        return value


A = pcm.Context(load)


def test_install_is_idempotent_and_restarts_nothing(own_client):
    pids = own_client.run(os.getpid)
    pcm.install(own_client)
    own_client.gather(own_client.map(use, range(8), ctx=A))
    pcm.install(own_client)
    assert own_client.run(os.getpid) == pids

    def n_loads(dask_worker):
        return dask_worker.plugins[CONTEXTS].contexts.store.n_loads(A.digest)

    def store(dask_worker):
        return id(dask_worker.plugins[CONTEXTS].contexts.store)

    stores = own_client.run(store)
    pcm.install(own_client)
    own_client.gather(own_client.map(use, range(8, 16), ctx=A))
    assert own_client.run(store) == stores
    assert max(own_client.run(n_loads).values()) == 1


def test_install_takes_the_last_client_or_says_that_there_is_none(own_client):
    pcm.install()
    assert install_module.is_installed(own_client)
    code = "import dask_pcm as pcm; pcm.install()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InstallError: There is no Dask client yet" in done.stderr


def test_versions_that_differ_are_refused(own_client, monkeypatch):
    monkeypatch.setattr(install_module, "__version__", "9.9.9")
    with pytest.raises(InstallError, match=r"dask_pcm is .* on the scheduler and 9\.9\.9 on"):
        pcm.install(own_client)


def test_a_worker_that_joins_later_gets_the_plugin(own_client):
    pcm.install(own_client)
    own_client.cluster.scale(3)
    own_client.wait_for_workers(3, timeout=patient(60))

    def has_plugin(dask_worker):
        return CONTEXTS in dask_worker.plugins

    assert list(own_client.run(has_plugin).values()) == [True] * 3


def test_a_restarted_worker_loads_again(own_client):
    pcm.install(own_client)
    own_client.gather(own_client.map(use, range(8), ctx=A))
    own_client.restart()
    assert own_client.gather(own_client.map(use, range(8), ctx=A)) == ["live"] * 8


def test_threads_are_this_workers_share_of_the_cores(own_client):
    pcm.install(own_client)

    def threads(i, ctx):
        import torch

        with hold([ctx.ref]):
            return torch.get_num_threads(), [
                os.environ[name] for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
            ]

    found = own_client.gather(own_client.map(threads, range(12), ctx=A))
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(said == (share, [str(share), "false"]) for said in found)


def heavy():
    """A context of 300 MB."""
    return bytearray(os.urandom(1 << 20) * 300)


def test_uninstalled_while_a_context_loads_limits_are_what_they_were():
    def slow(path):
        Path(path).touch()
        time.sleep(1.5)
        return bytearray(os.urandom(1 << 20) * 100)

    def limits(dask_worker):
        return dask_worker.memory_manager.memory_limit

    options = {"n_workers": 1, "threads_per_worker": 1, "memory_limit": "1GiB"}
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalCluster(**options, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        begun = Path(scratch, "begun")
        future = client.submit(use, 1, ctx=pcm.Context(slow, str(begun)))
        while not begun.exists():
            time.sleep(0.05)
        pcm.uninstall(client)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it goes on as a plain task
            future.result(30)
        time.sleep(0.5)
        assert list(client.run(limits).values()) == [1 << 30]
        nannies = [limits(nanny) for nanny in cluster.workers.values()]
        assert nannies == [1 << 30]


def test_weights_neither_pause_nor_kill_a_worker():
    """A worker with a limit of 600 MB, a context that brings it above: it goes on."""
    options = {"n_workers": 1, "threads_per_worker": 1, "memory_limit": "600MB"}
    with (
        LocalCluster(**options, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        (pid,) = client.run(os.getpid).values()
        futures = client.map(length, range(40), ctx=pcm.Context(heavy))
        wait(futures, timeout=patient(60))
        assert client.gather(futures) == [300 << 20] * 40
        assert set(client.run(os.getpid).values()) == {pid}

        def limit(dask_worker):
            return dask_worker.memory_manager.memory_limit, dask_worker.status.name

        ((raised, status),) = client.run(limit).values()
        assert 850e6 < raised < 1.3e9
        assert status == "running"
        (nanny,) = client.run(
            lambda dask_worker: dask_worker.memory_manager.memory_limit, nanny=True
        ).values()
        assert nanny == raised


def length(i, ctx):
    import time

    with hold([ctx.ref]) as (value,):
        time.sleep(0.05)  # long enough for several looks of the memory monitors
        return len(value)


def test_the_allocator_keeps_what_is_freed(own_client):
    """While a context is held in a worker, where the nanny asks for the opposite: a freed 20 MB
    block comes again without page faults, which a fresh mapping of it would cost."""

    def faults():
        import resource

        def once():
            block = bytearray(20 << 20)
            block[::4096] = b"x" * len(block[::4096])

        once()
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(10):
            once()
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    def faults_in_use(ctx):
        with pcm.acquire(ctx):
            return faults()

    fresh = max(own_client.run(faults).values())
    pcm.install(own_client)
    assert min(own_client.run(faults).values()) > 0.9 * fresh > 10_000
    assert own_client.submit(faults_in_use, A).result() < fresh / 10


def test_a_worker_without_the_plugin_loads_once_and_warns(own_client):
    def task():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with hold([A.ref]) as (value,):
                pass
        return value, [str(w.message) for w in caught]

    value, said = own_client.submit(task).result()
    assert value == "live"
    assert any("Call dask_pcm.install(client) first" in text for text in said)


def test_a_store_needs_no_cluster():
    assert Store().load(A.ref) == "live"


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, dask_pcm; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def tells_at_exit(path):
    import atexit
    import gc

    before = gc.get_freeze_count()
    atexit.register(lambda: Path(path).write_text(str(gc.get_freeze_count() > before)))


def test_the_end_of_a_worker_does_not_wait_for_a_search_of_cycles(tmp_path):
    """Among the objects of torch and transformers it takes seconds."""
    told = tmp_path / "told"
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    spawns = dask.config.set({"distributed.worker.multiprocessing-method": "spawn"})
    with spawns, LocalCluster(**options) as cluster, Client(cluster) as client:
        pcm.install(client)
        client.run(tells_at_exit, str(told))
    assert told.read_text() == "True"
