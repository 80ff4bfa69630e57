"""Contexts that share a device: real workers, whose CPU stands in for it with a budget."""

from __future__ import annotations

import collections
import os
import signal
from pathlib import Path

import dask
import pytest
import torch
from dask.distributed import Client, wait

import dask_pcm as pcm
from dask_pcm.errors import LoadError
from dask_pcm.plugins.nanny.plugin import KeeperPlugin
from dask_pcm.plugins.scheduler.plugin import GATE
from tests.conftest import validated_cluster
from tests.support.patience import patient, until

MIB = 1 << 20


def load(log, number, size_mib=4):
    with Path(log).open("a") as file:
        print(number, file=file)
    module = torch.nn.Linear(1, size_mib << 18, bias=False)
    torch.nn.init.constant_(module.weight, number)
    return module


def ask(i, *contexts):
    with pcm.acquire(*contexts) as found:
        modules = found if len(contexts) > 1 else [found]
        return i, [module.weight[-1].item() for module in modules]


@pytest.fixture
def log(tmp_path):
    return str(tmp_path / "loads")


@pytest.fixture
def client(tmp_path):
    """One worker, whose device has 10 MiB."""
    with (
        dask.config.set({"pcm.ladder.device.budget": "10 MiB"}),
        validated_cluster(n_workers=1) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        yield client
        cluster.scheduler.plugins[GATE].state.validate()
        assert client.run(check) != []


def check(dask_worker):
    store = dask_worker.plugins["pcm-contexts"].contexts.store
    store.validate()
    return {ref: store.tier(ref).value for ref in list(store._residencies.by_digest)}


def tiers(client):
    (found,) = client.run(check).values()
    return sorted(found.values())


def n_kept(dask_worker):
    """Images are made while the contexts are in use already."""
    return len(dask_worker.plugins["pcm-contexts"].contexts.store._residencies._host._images)


def contexts(log, n, **options):
    return [
        pcm.Context(load, log, i, device_memory=4 * MIB, name=f"c{i}", **options) for i in range(n)
    ]


def loads(log):
    return collections.Counter(map(int, Path(log).read_text().split()))


def test_three_of_which_two_fit_are_loaded_once_each(client, log):
    three = contexts(log, 3)
    futures = [client.submit(ask, i, three[i % 3]) for i in range(60)]
    assert client.gather(futures) == [(i, [float(i % 3)]) for i in range(60)]
    assert loads(log) == {0: 1, 1: 1, 2: 1}
    # A move that was under way at the end may still be.
    until(lambda: tiers(client) == ["device", "device", "host"])


def test_a_task_that_needs_two_gets_both_or_waits(client, log):
    three = contexts(log, 3)
    futures = []
    for i in range(30):
        pair = (i % 3, (i + 1) % 3)
        futures.append(client.submit(ask, i, *(three[k] for k in pair)))
    answers = client.gather(futures)
    assert answers == [(i, [float(i % 3), float((i + 1) % 3)]) for i in range(30)]
    assert loads(log) == {0: 1, 1: 1, 2: 1}


def test_what_fits_on_no_device_is_refused_before_it_is_loaded(client, log):
    large = pcm.Context(load, log, 9, 40, device_memory="40 MiB", name="large")
    with pytest.raises(pcm.errors.LoadError) as caught:
        client.submit(ask, 0, large).result(30)
    assert "'large' needs 41,943,040 bytes" in str(caught.value)
    assert "10,485,760" in str(caught.value)
    assert not Path(log).exists()
    one = contexts(log, 1)[0]
    assert client.submit(ask, 1, one).result(30) == (1, [0.0])


def test_of_undeclared_size_it_is_refused_once_it_is_known(client, log):
    large = pcm.Context(load, log, 9, 40, name="large")
    with pytest.raises(pcm.errors.LoadError, match=r"'large' needs 41,943,040 bytes"):
        client.submit(ask, 0, large).result(60)
    assert loads(log) == {9: 1}


def test_undeclared_ones_make_room_as_they_are_measured(client, log):
    three = [pcm.Context(load, log, i, name=f"c{i}") for i in range(3)]
    for i in range(6):
        assert client.submit(ask, i, three[i % 3]).result(30) == (i, [float(i % 3)])
    assert loads(log) == {0: 1, 1: 1, 2: 1}


def test_hidden_from_the_gate_they_share_all_the_same(client, log):
    three = contexts(log, 3)

    def hidden(i):
        return ask(i, three[i % 3])

    futures = [client.submit(hidden, i) for i in range(12)]
    wait(futures, timeout=patient(60))
    assert client.gather(futures) == [(i, [float(i % 3)]) for i in range(12)]
    assert loads(log) == {0: 1, 1: 1, 2: 1}


@pytest.mark.usefixtures("spawned")
def test_on_a_small_host_what_finds_no_room_is_loaded_again(log, capfd):
    """The device has room for two contexts, the host for one: it never takes more."""
    sizes = {"pcm.ladder.device.budget": "10 MiB", "pcm.ladder.host.budget": "6 MiB"}
    with (
        dask.config.set(sizes),
        validated_cluster(n_workers=1) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        (nanny,) = cluster.workers.values()
        shelf = nanny.plugins[KeeperPlugin.name].images.shelf
        four = contexts(log, 4)
        for i in range(16):
            assert client.submit(ask, i, four[i % 4]).result(60) == (i, [float(i % 4)])
            assert sum(kept.n_bytes for kept in shelf._kept.values()) <= 6 * MIB
            assert sum(bool(kept.pins) for kept in shelf._kept.values()) <= 1
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        for i in range(16, 20):
            assert client.submit(ask, i, four[i % 4]).result(60) == (i, [float(i % 4)])
    assert all(n > 1 for n in loads(log).values())
    assert "no room for it (pcm.ladder.host.budget" in capfd.readouterr().err


def test_killed_all_are_found_again(client, log):
    three = contexts(log, 3)
    client.gather([client.submit(ask, i, three[i]) for i in range(3)])
    until(lambda: list(client.run(n_kept).values()) == [3])
    (pid,) = client.run(os.getpid).values()
    os.kill(pid, signal.SIGKILL)
    futures = [client.submit(ask, i, three[i], pure=False) for i in range(3)]
    assert client.gather(futures) == [(i, [float(i)]) for i in range(3)]
    assert loads(log) == {0: 1, 1: 1, 2: 1}


def test_idle_it_goes_down_and_comes_back_without_a_load(log):
    settings = {"pcm.ladder.device.budget": "10 MiB", "pcm.context.idle-timeout": "300ms"}
    with (
        dask.config.set(settings),
        validated_cluster(n_workers=1) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        (one,) = contexts(log, 1)
        client.submit(ask, 0, one).result(30)
        until(lambda: list(client.run(check).values()) == [{one.digest: "host"}])
        assert client.submit(ask, 1, one).result(30) == (1, [0.0])
    assert loads(log) == {0: 1}


def taken(context, what):
    with pcm.acquire(context) as module:
        return {"parameter": module.weight, "row": module.weight.detach()[-1]}[what]


@pytest.mark.parametrize("what", ["parameter", "row"])
def test_what_a_task_has_returned_stays_as_it_was(client, log, what):
    """Others have taken the context's place by the time it is asked for."""
    three = contexts(log, 3)
    results = [client.submit(taken, context, what, pure=False) for context in three]
    wait(results)
    client.gather([client.submit(ask, i, three[i % 3], pure=False) for i in range(12)])
    pids = client.run(os.getpid)
    assert [result.flatten()[-1].item() for result in client.gather(results)] == [0, 1, 2]
    assert client.run(os.getpid) == pids  # no process has died of it


def test_a_size_that_was_declared_wrongly_can_be_corrected(client, log):
    with pytest.raises(LoadError, match="41,943,040"):
        context = pcm.Context(load, log, 7, device_memory="40 MiB")
        client.submit(ask, 0, context, pure=False).result()
    context = pcm.Context(load, log, 7, device_memory="4 MiB")
    assert client.submit(ask, 0, context, pure=False).result() == (0, [7.0])
