"""Weights that outlive their worker process: real workers, killed for real."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest
import torch
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.plugins.nanny.plugin import NannyLink
from tests.conftest import validated_cluster
from tests.ladder.objects.test_images import shmem_bytes
from tests.support.patience import until


def load(log, size_mib=1):
    """Note that it was called; what it returns says in which process it was built."""
    with Path(log).open("a") as file:
        print(os.getpid(), file=file)
    torch.manual_seed(0)
    module = torch.nn.Linear(512, size_mib * 512)
    module.built_by = os.getpid()
    return module


def ask(number, context):
    with pcm.acquire(context) as module:
        answer = module(torch.full((1, 512), float(number))).sum().item()
        return os.getpid(), module.built_by, round(answer, 3)


def n_loads(log):
    return len(Path(log).read_text().splitlines())


pytestmark = pytest.mark.usefixtures("spawned")


@pytest.fixture
def log(tmp_path):
    return str(tmp_path / "loads")


@contextmanager
def cluster(n_workers=1, **options):
    with validated_cluster(n_workers=n_workers, **options) as cluster, Client(cluster) as client:
        pcm.install(client)
        yield client


def test_a_killed_worker_finds_its_weights_again(log):
    context = pcm.Context(load, log)
    with cluster() as client:
        first = client.submit(ask, 1, context).result(60)
        for _ in range(2):
            pid, *_ = client.submit(ask, 1, context, pure=False).result(60)
            os.kill(pid, signal.SIGKILL)
            again = client.submit(ask, 1, context, pure=False).result(60)
            assert again[0] != pid
            assert again[1:] == first[1:]
    assert n_loads(log) == 1


def test_on_cpus_workers_of_a_host_share_them(log):
    """Built once; whoever needs it next maps the same memory."""
    context = pcm.Context(load, log)
    with cluster(n_workers=2) as client:
        one, other = client.scheduler_info()["workers"]
        first = client.submit(ask, 1, context, workers=[one]).result(60)
        second = client.submit(ask, 1, context, workers=[other], pure=False).result(60)
        assert first[0] != second[0] and first[1:] == second[1:]
    assert n_loads(log) == 1


def test_released_it_is_gone_and_its_memory_free(log):
    context = pcm.Context(load, log, 256)
    with cluster() as client:
        client.submit(ask, 1, context).result(60)
        before = shmem_bytes()
        assert pcm.release(context, client=client) == 1
        until(lambda: before - shmem_bytes() > 200 << 20)
        client.submit(ask, 1, context, pure=False).result(60)
    assert n_loads(log) == 2


def test_when_the_cluster_ends_its_memory_is_free(log):
    """The nannies' process lives on; so may a notebook's."""
    with cluster() as client:
        client.submit(ask, 1, pcm.Context(load, log, 256)).result(60)
        before = shmem_bytes()
    until(lambda: before - shmem_bytes() > 200 << 20)


def test_uninstalled_its_memory_is_free(log):
    with cluster() as client:
        client.submit(ask, 1, pcm.Context(load, log, 256)).result(60)
        before = shmem_bytes()
        pcm.uninstall(client)
        until(lambda: before - shmem_bytes() > 200 << 20)


def test_where_there_is_no_room_for_it_the_log_says_so_and_it_is_loaded_again(log, capfd):
    context = pcm.Context(load, log)
    with dask.config.set({"pcm.ladder.host.budget": "0 B"}), cluster() as client:
        pid, *_ = client.submit(ask, 1, context).result(60)
        os.kill(pid, signal.SIGKILL)
        client.submit(ask, 1, context, pure=False).result(60)
    assert n_loads(log) == 2
    assert "not kept on the host tier" in capfd.readouterr().err


def is_back(client, pid):
    found = list(client.run(os.getpid, on_error="ignore").values())
    return len(found) == 1 and isinstance(found[0], int) and found[0] != pid


def test_released_after_its_worker_was_killed_it_is_gone(log):
    context = pcm.Context(load, log)
    with cluster() as client:
        pid, *_ = client.submit(ask, 1, context).result(60)
        os.kill(pid, signal.SIGKILL)
        until(lambda: is_back(client, pid))
        pcm.release(context, client=client)
        client.submit(ask, 1, context, pure=False).result(60)
    assert n_loads(log) == 2


def test_who_restarts_the_cluster_wants_nothing_of_before(log):
    context = pcm.Context(load, log)
    with cluster() as client:
        client.submit(ask, 1, context).result(60)
        client.restart()
        client.submit(ask, 1, context, pure=False).result(60)
    assert n_loads(log) == 2


def end_process():
    return os._exit(1)


def test_a_loader_that_ends_its_process_ends_its_tasks():
    with cluster() as client:
        future = client.submit(ask, 1, pcm.Context(end_process, name="deadly"))
        with pytest.raises(pcm.errors.LoadError, match="ended while it loaded context 'deadly'"):
            future.result(60)


def test_without_a_nanny_there_is_nobody_to_keep_it(log):
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        assert client.submit(ask, 1, pcm.Context(load, log)).result(60)[0] == os.getpid()
    assert n_loads(log) == 1


def test_a_nanny_that_is_not_asked_any_more_has_refused_nothing():
    link = NannyLink(SimpleNamespace(nanny="tcp://127.0.0.1:1"))
    link.close()
    assert link.keep("digest", "/proc/1/fd/3", 17, is_shared=True, is_pinned=False) is None
