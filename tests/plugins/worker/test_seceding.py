"""Tasks that wait for other tasks while they hold an exclusive context."""

from __future__ import annotations

import threading

import dask
import pandas as pd
import pytest
from distributed import Client, LocalCluster, get_client, rejoin, secede, worker_client

import dask_pcm as pcm

META = {"id": "i8", "sum": "i8"}
N_ROWS = 24
LIMIT_S = 60


class Exclusive:
    """A live object that notices when two threads use it at once."""

    def __init__(self, name):
        self.name = name
        self.lock = threading.Lock()

    def add(self, x):
        assert self.lock.acquire(blocking=False), "used by two at once"
        try:
            threading.Event().wait(0.002)
            return x + 1
        finally:
            self.lock.release()


def load(name):
    return Exclusive(name)


def add(x, model=None):
    if model is None:
        return x + 1
    with pcm.acquire(model) as live:
        return live.add(x)


def by_compute(xs, model):
    return sum(dask.compute(*[dask.delayed(add)(x, model=model) for x in xs]))


def by_worker_client(xs, model):
    with worker_client() as client:
        return sum(client.gather(client.map(add, xs, model=model, pure=False)))


def by_secede(xs, model):
    client = get_client()
    futures = client.map(add, xs, model=model, pure=False)
    secede()
    found = sum(client.gather(futures))
    rejoin()
    return found


WAYS = {
    "compute": by_compute,
    "worker_client": by_worker_client,
    "secede": by_secede,
}


@pytest.fixture(
    scope="module", params=["1 worker, 1 lane", "1 worker, 2 lanes", "2 workers, 2 lanes"]
)
def cluster_client(request):
    n_workers, n_lanes = (int(word.split()[0]) for word in request.param.split(", "))
    with (
        dask.config.set({"pcm.worker.lanes": n_lanes, "pcm.worker.imports": []}),
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        yield client


def frame_of(folder, way, mine, model):
    """A frame whose function waits, by one of the ways, for tasks that need `model`."""

    def verify(frame, live):
        before = live.add(0)
        found = WAYS[way](list(frame["id"]), model)
        assert live.add(0) == before
        return pd.DataFrame({"id": frame["id"], "sum": found})

    given = pcm.read_parquet(folder)
    return pcm.map_partitions(verify, given, context=mine, meta=META, batch_rows=3)


EXPECTED = [3 * (i - i % 3) + 6 for i in range(N_ROWS)]


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("nested", ["no context", "the same context", "another context"])
def test_a_run_whose_function_computes_goes_on(cluster_client, claims, tmp_path, nested):
    mine, other = pcm.Context(load, "mine"), pcm.Context(load, "other")
    model = {"no context": None, "the same context": mine, "another context": other}[nested]
    ddf = frame_of(claims(n_files=2, n_rows=N_ROWS // 2), "compute", mine, model)
    run = pcm.write_parquet(ddf, tmp_path / "out", progress=False)
    assert (run.report.rows, run.report.rows_failed) == (N_ROWS, 0), run.report.errors
    assert pd.read_parquet(tmp_path / "out")["sum"].tolist() == EXPECTED


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("way", WAYS)
def test_a_frame_whose_function_waits_for_tasks_goes_on(cluster_client, claims, way):
    mine = pcm.Context(load, "mine")
    found = frame_of(claims(n_files=2, n_rows=N_ROWS // 2), way, mine, mine).compute()
    assert found["sum"].tolist() == EXPECTED, found["error"].dropna().tolist()


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.filterwarnings("ignore:Context 'load' is loaded in the middle")
def test_on_dasks_own_threads_too(cluster_client):
    """Where the gate cannot see the context, and its tasks run beside plain ones."""
    hidden = pcm.Context(load, "hidden")

    def computing(x):
        with pcm.acquire(hidden) as live:
            return live.add(by_compute([x, x], hidden))

    futures = cluster_client.map(computing, range(6), pure=False)
    assert cluster_client.gather(futures) == [2 * x + 3 for x in range(6)]


@pytest.mark.timeout(LIMIT_S)
def test_a_task_that_never_rejoins_has_given_its_turn_away(cluster_client):
    def leaving(x, model):
        with pcm.acquire(model):
            secede()
            return add(x, model) + get_client().submit(add, x, model, pure=False).result()

    futures = cluster_client.map(leaving, range(6), model=pcm.Context(load, "left"))
    assert cluster_client.gather(futures) == [2 * x + 2 for x in range(6)]
    assert cluster_client.submit(add, 1, pcm.Context(load, "left"), pure=False).result() == 2
