"""Workers of a host lend each other what their devices have to spare: real processes."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import dask
import pytest
import torch
from dask.distributed import Client

import dask_pcm as pcm
from dask_pcm.config import Config
from dask_pcm.inference.engine.rows import Generated
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.engine.timeslice import Kind, Owner
from dask_pcm.ladder.store import Store
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.plugins.worker.lending import WorkerLending
from tests.conftest import validated_cluster
from tests.inference.engine.conftest import Alone
from tests.ladder.lending.conftest import neighbours
from tests.plugins.worker.test_sharing import MIB, ask, load
from tests.support.images import images, labels, load_vit
from tests.support.patience import until


@pytest.fixture
def lending():
    """What ``pcm.ladder.lending`` is."""
    return "auto"


@pytest.fixture
def client(lending):
    """Two workers, whose devices have 10 MiB each."""
    with (
        dask.config.set({"pcm.ladder.device.budget": "10 MiB", "pcm.ladder.lending": lending}),
        validated_cluster(n_workers=2) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        # Workers open it once the gate has welcomed them.
        until(lambda: lending == "never" or all(client.run(is_open).values()))
        yield client
        cluster.scheduler.plugins[GATE].state.validate()
        client.run(validate)


def validate(dask_worker):
    dask_worker.plugins["pcm-contexts"].contexts.store.validate()


def is_open(dask_worker):
    lending = dask_worker.plugins["pcm-contexts"].contexts.store.lending
    return lending._server is not None


def lent_bytes(dask_worker):
    lending = dask_worker.plugins["pcm-contexts"].contexts.store.lending
    return (lending.leases.lent_bytes(), lending.borrowed_bytes) if lending else None


@pytest.fixture
def host():
    yield from neighbours()


@pytest.fixture
def informed(host):
    """A worker's part in lending, without the worker; it has 10 MiB on its device."""
    found = []

    def made(**options):
        with dask.config.set({"pcm.ladder.device.budget": "10 MiB", **options}):
            config = Config.read()
        store = Store(budget=lambda: 10 * MIB, is_mapped=False)
        worker, memory = SimpleNamespace(address="tcp://lender"), Mock()
        one = WorkerLending(worker, config, store, memory, lambda message: None)
        found.append((one, store))
        return one, store

    yield made
    for one, store in found:
        one.close()
        store.validate()
        store.close()


class Busy:
    """A live object with an engine whose pages suffice for two questions."""

    is_attended = True

    def attend(self):
        make = lambda: Alone("llama").engine(n_pages=8, most_bytes=0).engine  # noqa: E731
        return Serving(make, n_bytes=0, n_rows=30)


def load_busy():
    return Busy()


def test_a_worker_whose_requests_lack_memory_takes_back_what_it_lends(host, informed):
    lending, store = informed()
    lending.open(host.cluster)
    borrower = host.worker()
    until(lambda: store.lending._server is not None)
    loan = borrower.lending.borrow("neighbour", MIB)
    loan.on_wanted(loan.close)
    ref = pcm.Context(load_busy).ref
    store.load(ref)
    row = {"n_prompt": 50, "n_max": 150, "owner": Owner(Kind.QUESTION, "me")}
    serving = store.attendant(ref.digest)
    asked = [serving.ask(Generated([7 + k] * 50, **row)) for k in range(30)]
    until(lambda: loan.is_closed)
    leases = store.lending.leases
    assert not leases.is_offering
    assert borrower.lending.borrow("neighbour", MIB // 2) is None
    for future in asked:
        future.cancel()
    until(lambda: leases.is_offering)  # quiet for a while
    until(lambda: (found := borrower.lending.borrow("neighbour", MIB // 4)) and not found.close())


def test_gpus_are_named_for_all_processes_and_its_own_comes_first(informed, monkeypatch):
    """As far as that can be tried without a GPU."""
    monkeypatch.setattr("dask_pcm.plugins.worker.lending.declared_device", lambda: "cuda")
    lending, _ = informed()
    assert lending._devices() == {} and lending._device() is None  # torch has not used any yet
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda k: SimpleNamespace(uuid=f"GPU-{k}")
    )
    expected = {"cuda:GPU-1": "cuda:1", "cuda:GPU-0": "cuda:0", "cuda:GPU-2": "cuda:2"}
    assert list(lending._devices().items()) == list(expected.items())
    assert lending._device() == "cuda:GPU-1"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 << 30, 80 << 30))
    assert lending._is_free(14 << 30) and not lending._is_free(16 << 30)


def used(client, worker, *contexts):
    futures = [client.submit(ask, 0, one, workers=[worker], pure=False) for one in contexts]
    return [values[0] for _, values in client.gather(futures)]


def contexts(log, n, size_mib=4):
    return [pcm.Context(load, log, k, size_mib, name=f"c{k}") for k in range(n)]


def test_a_context_that_makes_room_goes_to_a_neighbours_device(client, tmp_path):
    log = str(tmp_path / "loads")
    first, second = sorted(client.scheduler_info()["workers"])
    made = contexts(log, 6)
    assert used(client, first, *made[:3]) == [0, 1, 2]
    lent = client.run(lent_bytes)
    assert lent == {first: (0, 4 * MIB), second: (4 * MIB, 0)}
    # The neighbour needs it itself.
    assert used(client, second, *made[3:5]) == [3, 4]
    assert until(lambda: client.run(lent_bytes) == {first: (0, 0), second: (0, 0)})
    assert used(client, first, *made[:3]) == [0, 1, 2]
    assert sorted((tmp_path / "loads").read_text().split()) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("who", ["lender", "borrower"])
def test_a_worker_that_is_killed_takes_nothing_along(client, tmp_path, who):
    first, second = sorted(client.scheduler_info()["workers"])
    made = contexts(str(tmp_path / "loads"), 3)
    assert used(client, first, *made) == [0, 1, 2]
    assert client.run(lent_bytes)[second] == (4 * MIB, 0)
    killed = first if who == "borrower" else second
    (pid,) = client.run(os.getpid, workers=[killed]).values()
    os.kill(pid, signal.SIGKILL)
    left = second if who == "borrower" else first
    until(lambda: client.run(lent_bytes, workers=[left]) == {left: (0, 0)})
    client.wait_for_workers(2)
    assert used(client, left, *made) == [0, 1, 2]


@pytest.mark.parametrize("lending", ["never"])
def test_it_can_be_switched_off(client, tmp_path):
    first, second = sorted(client.scheduler_info()["workers"])
    made = contexts(str(tmp_path / "loads"), 3)
    assert used(client, first, *made) == [0, 1, 2]
    assert client.run(lent_bytes) == {first: None, second: None}


def label(n, model):
    with pcm.acquire(model) as module:
        return labels(images(n), module)["label"].tolist()


def test_an_image_model_makes_room_at_a_neighbour_and_comes_back(client):
    first, second = sorted(client.scheduler_info()["workers"])
    made = [pcm.Context(load_vit, width, 6, name=f"vit {width}") for width in (128, 136, 144)]

    def labelled():
        futures = [client.submit(label, 5, one, workers=[first], pure=False) for one in made]
        return client.gather(futures)

    expected = [
        labels(images(5), load_vit(width, 6))["label"].tolist() for width in (128, 136, 144)
    ]
    assert labelled() == expected
    assert client.run(lent_bytes)[second][0] > 3 * MIB
    assert labelled() == expected
