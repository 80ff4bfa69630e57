"""Installing, uninstalling, and clusters that others start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import psutil
import pytest
from distributed import (
    Client,
    Event,
    LocalCluster,
    Security,
    Worker,
    secede,
    wait,
    worker_client,
)
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils_test import gen_cluster, inc

import dask_pcm as pcm
from dask_pcm.errors import RecipeError
from dask_pcm.ladder.store import of_process
from dask_pcm.plugins import delivery
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.plugins.scheduler.tasks.parking import PARKED
from dask_pcm.plugins.worker.plugin import CONTEXTS
from tests.support.gated import gated, install, poll
from tests.support.patience import patient, until


def load(name="a"):
    return [name]


def use(i, model=None):
    with pcm.acquire(model) as live:
        return i, live[0]


def numbers(i, model=None):
    return i


ROOT = Path(__file__).parents[2]
A, B = pcm.Context(load, "a"), pcm.Context(load, "b")


@gated(is_held=True)
async def test_uninstall_with_work_waiting(c, s, gate, a, b):
    only = c.map(numbers, range(4), model=A, key="only", workers=[b.address])
    futures = c.map(numbers, range(10), model=A)
    child = c.submit(sum, futures)
    await poll(lambda: len(gate.state.ahead.waiting) == 14, 5)
    gate.uninstall()
    await c.unregister_worker_plugin(CONTEXTS)
    assert await c.gather(futures) == list(range(10)) and await child == 45
    await wait(only)
    assert set((await c.who_has(only)).values()) == {(b.address,)}
    assert GATE not in s.plugins and not s.unrunnable
    assert all(s.tasks[f.key].worker_restrictions is None for f in futures)
    assert a.state.nthreads == b.state.nthreads == 1


@gated()
async def test_what_is_in_use_during_uninstall_is_closed_after_it(c, s, gate, a, b):
    closed = Event("closed")

    def using(i, model):
        with pcm.acquire(model):
            Event("using").set()
            assert Event("go").wait(patient(20))
        return i

    future = c.submit(using, 1, pcm.Context(load, "in use", close=lambda live: closed.set()))
    await Event("using").wait(patient(10))
    gate.uninstall()
    await c.unregister_worker_plugin(CONTEXTS)
    assert not await closed.is_set()
    await Event("go").set()
    assert await future == 1
    await asyncio.wait_for(closed.wait(), 10)


@gated(is_held=True)
async def test_annotations_of_the_users_own_are_theirs_again_after_uninstall(c, s, gate, a, b):
    a.executors["mine"] = b.executors["mine"] = ThreadPoolExecutor(1, thread_name_prefix="mine")

    def thread_of(i, model=None):
        return threading.current_thread().name.rsplit("_", 1)[0]

    with dask.annotate(executor="mine"):
        future = c.submit(thread_of, 1, model=A)
    await poll(lambda: len(gate.state.ahead.waiting) == 1, 5)
    gate.uninstall()
    await c.unregister_worker_plugin(CONTEXTS)
    assert await future == "mine"


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_what_a_task_holds_during_install_goes_when_it_is_let_go(c, s, a):
    closed = Event("closed")

    def using(i, model):
        with pcm.acquire(model):
            Event("using").set()
            assert Event("go").wait(patient(20))
        return i

    held = pcm.Context(load, "held", close=lambda live: Event("closed").set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        future = c.submit(using, 1, model=held)
        await Event("using").wait(patient(10))
    await install(c)
    assert not await closed.is_set()
    await Event("go").set()
    assert await future == 1
    await asyncio.wait_for(closed.wait(), 10)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_what_tasks_loaded_before_is_not_kept_twice(c, s, a):
    before = pcm.Context(load, "before")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert await c.submit(use, 1, model=before) == (1, "before")
    assert of_process().n_loads(before.digest) == 1
    await install(c)
    await poll(lambda: of_process().n_loads(before.digest) == 0, 5)
    assert await c.submit(use, 2, model=before) == (2, "before")


@pytest.mark.parametrize("is_again", [False, True])
def test_uninstall_while_tasks_secede(own_client, is_again):
    """Some have before, and come back at their end; others do after it."""
    pcm.install(own_client)

    def nested(i, model):
        with worker_client() as client:
            Event(f"waits-{i}").set()
            assert Event("go").wait(patient(20))
            return client.submit(inc, i).result()

    def later(i, model):
        Event(f"runs-{i}").set()
        assert Event("go").wait(patient(20))
        secede()
        return i

    futures = own_client.map(nested, range(2), model=A)
    futures += own_client.map(later, range(2), model=A)
    for name in ("waits-0", "waits-1", "runs-0", "runs-1"):
        assert Event(name).wait(patient(20))
    pcm.uninstall(own_client)
    if is_again:
        pcm.install(own_client)
    Event("go").set()
    assert own_client.gather(futures) == [1, 2, 0, 1]
    del futures

    def counts(dask_scheduler):
        return [n for ws in dask_scheduler.workers.values() for n in ws.task_prefix_count.values()]

    def n_lanes():
        return sum("pcm-lane" in thread.name for thread in threading.enumerate())

    assert not any(own_client.run_on_scheduler(counts))
    until(lambda: is_again or not any(own_client.run(n_lanes).values()), 10)


@gated()
async def test_uninstall_with_work_running_and_again_installed(c, s, gate, a, b):
    async def slow(i, model=None):
        await asyncio.sleep(0.05)
        return i

    first = c.map(slow, range(20), model=A)
    await poll(lambda: bool(gate.state.placed), 10)
    gate.uninstall()
    await c.unregister_worker_plugin(CONTEXTS)
    assert await c.gather(first) == list(range(20))
    with contextlib.suppress(ValueError):
        await c.unregister_worker_plugin("pcm-allowance", nanny=True)
    await install(c)
    again = s.plugins[GATE]
    assert again is not gate
    await poll(lambda: len(again.workers.members) == 2, 5)
    assert await c.gather(c.map(numbers, range(20), model=A)) == list(range(20))
    assert again.contexts.loads[A.digest].n >= 1
    again.state.validate()


def test_uninstall_for_users(own_client):
    pcm.uninstall(own_client)  # nothing there: nothing happens
    pcm.install(own_client)
    assert own_client.gather(own_client.map(use, range(4), model=A)) == [(i, "a") for i in range(4)]
    pcm.uninstall(own_client)

    def left(dask_worker):
        return CONTEXTS in dask_worker.plugins, dask_worker.state.nthreads

    assert set(own_client.run(left).values()) == {(False, 1)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = own_client.gather(own_client.map(use, range(4, 8), model=A))
        own_client.run(lambda: None)
    assert found == [(i, "a") for i in range(4, 8)]
    assert any("not installed on this cluster" in str(w.message) for w in caught)
    pcm.install(own_client)
    own_client.gather(own_client.map(use, range(8, 12), model=A))


def test_uninstall_while_a_run_is_at_work(own_client, claims, tmp_path):
    """It goes on, each worker with a context of its own."""
    pcm.install(own_client)

    def slow(frame, model):
        time.sleep(0.02)
        return frame[["id"]]

    frame = pcm.read_parquet(claims())
    made = pcm.map_partitions(slow, frame, context=A, meta={"id": "i8"}, batch_rows=4)
    run = pcm.write_parquet(made, tmp_path / "out", wait=False)
    until(lambda: run.progress.done)
    pcm.uninstall(own_client)
    assert run.wait(patient(60)).rows == 200


def test_uninstall_that_got_half_way_is_finished_by_the_next(own_client):
    def leave(dask_scheduler):
        dask_scheduler.plugins[GATE].uninstall()

    pcm.install(own_client)
    own_client.run_on_scheduler(leave)
    pcm.install(own_client)  # a new gate, to workers that have their side already
    assert own_client.submit(use, 1, model=A).result(timeout=patient(20)) == (1, "a")
    own_client.run_on_scheduler(leave)
    pcm.uninstall(own_client)

    def has_plugin(dask_worker):
        return CONTEXTS in dask_worker.plugins

    assert set(own_client.run(has_plugin).values()) == {False}


def test_installing_again_and_again_leaves_no_threads(own_client):
    """But one: it gives back what plain tasks free in heaps that have grown."""

    def n_threads():
        names = [thread.name for thread in threading.enumerate() if "pcm" in thread.name]
        return len(names) - ("pcm-tuning" in names)

    for _ in range(3):
        pcm.install(own_client)
        future = own_client.submit(use, 1, model=A, pure=False)
        assert future.result(timeout=patient(20)) == (1, "a")
        pcm.uninstall(own_client)
    until(lambda: not any(own_client.run(n_threads).values()), 10)


def run_all(made, out, client):
    return pcm.write_parquet(made, out, client=client)


def draw(made, out, client):
    return pcm.sample(made, 2, output=out, client=client)


DOORS = (
    lambda made, out, client: pcm.install(client),
    lambda made, out, client: pcm.uninstall(client),
    lambda made, out, client: pcm.release(A, client=client),
    lambda made, out, client: pcm.explain("key", client=client),
    run_all,
    draw,
)


def job(claims):
    frame = pcm.read_parquet(claims())
    return pcm.map_partitions(rows, frame, context=A, meta={"id": "i8"}, batch_rows=8)


def rows(frame, model):
    return frame[["id"]]


def test_an_asynchronous_client_is_refused(claims, tmp_path):
    """At every door, with the toolkit's own message, before anything is begun."""
    made = job(claims)

    @gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
    async def on_cluster(c, s, a):
        for client in (c, None):  # given, or the one made last
            with c.as_current():
                for door in DOORS:
                    with pytest.raises(pcm.PCMError, match="This client is asynchronous"):
                        door(made, tmp_path / "out", client)
        assert GATE not in s.plugins

    on_cluster()
    assert not (tmp_path / "out").exists()


def test_a_client_that_is_closed_is_refused(claims, tmp_path):
    made = job(claims)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.close()
        for door in DOORS:
            with pytest.raises(pcm.PCMError, match=r"The client \S+ is closed\. Make another one"):
                door(made, tmp_path / "out", client)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def frozen(own_client, monkeypatch):
    """The process of one of two workers, stopped; the other answers."""
    monkeypatch.setattr(delivery, "PATIENCE_S", 4.0)
    process = psutil.Process(next(iter(own_client.run(os.getpid).values())))
    process.suspend()
    yield process
    with contextlib.suppress(psutil.Error):
        process.resume()


def members(client):
    gate = client.cluster.scheduler.plugins.get(GATE)
    return [] if gate is None else list(gate.workers.members)


def test_a_frozen_worker_gets_its_side_when_it_is_back(own_client, frozen, claims, tmp_path):
    """Workers that answer are enough, to install and for a run."""
    assert pcm.write_parquet(job(claims), tmp_path / "out", progress=False).report.rows == 200
    assert len(members(own_client)) == 1
    frozen.resume()
    until(lambda: len(members(own_client)) == 2, 60, "the other worker says hello")
    pcm.install(own_client)  # again: changes nothing
    assert len(members(own_client)) == 2


def test_a_frozen_worker_does_not_hold_up_uninstall(own_client, frozen):
    pcm.install(own_client)
    pcm.uninstall(own_client)
    frozen.resume()

    def has_plugin(dask_worker):
        return CONTEXTS in dask_worker.plugins

    until(lambda: not any(own_client.run(has_plugin).values()), 60, "all have dropped theirs")


def test_a_worker_that_is_lost_while_the_toolkit_comes(own_client, frozen):
    killing = threading.Timer(1.0, frozen.kill)
    killing.start()
    pcm.install(own_client)  # no error
    killing.join()
    until(lambda: len(members(own_client)) == 2, 60, "its successor says hello")


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 2)
async def test_install_while_a_graph_waits(c, s, a, b):
    """What runs already runs on; what waits, queued or for its inputs, goes through the gate."""

    def blocked(i):
        time.sleep(0.5)
        return i

    first = c.map(blocked, range(4), key="first")
    waiting = c.map(numbers, first, model=A, key="waiting")
    queued = c.map(numbers, range(40), model=A, key="queued")
    restricted = c.submit(numbers, 1, model=A, key="nobody", resources={"NO": 1})
    await poll(lambda: bool(s.queued) and bool(s.unrunnable), 10)
    await install(c)
    gate = s.plugins[GATE]
    assert not any(ts.key in gate.parked.asked for ts in s.queued)
    assert await c.gather(waiting) == list(range(4))
    assert await c.gather(queued) == list(range(40))
    assert all(s.tasks[f.key].worker_restrictions == {PARKED} for f in waiting + queued)
    assert gate.contexts.loads[A.digest].n >= 1
    assert restricted.status == "pending"
    async with Worker(s.address, resources={"NO": 1}):
        assert await restricted == 1
    gate.state.validate()


class Elsewhere(SchedulerPlugin):
    """Another plugin that restricts tasks as they come."""

    name = "elsewhere"

    def __init__(self, address):
        self.address = address

    def update_graph(self, scheduler, *, tasks, **kwargs):
        for key in tasks:
            if (ts := scheduler.tasks.get(key)) is not None:
                ts.worker_restrictions = {self.address}


@pytest.mark.parametrize("is_before", [True, False])
def test_another_plugin_that_restricts(is_before):
    """Whether it is called before the gate or after it, nothing hangs and nothing runs cold."""

    @gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 2)
    async def on_cluster(c, s, a, b):
        other = Elsewhere(b.address)
        if is_before:
            s.add_plugin(other, name=other.name)
        await install(c)
        gate = s.plugins[GATE]
        if not is_before:
            s.add_plugin(other, name=other.name)
            await poll(lambda: list(s.plugins)[-1] == GATE, 5)
        await poll(lambda: len(gate.workers.members) == 2, 5)
        futures = c.map(use, range(8), model=A)
        assert await asyncio.wait_for(c.gather(futures), 20) == [(i, "a") for i in range(8)]
        assert {w for ws in (await c.who_has(futures)).values() for w in ws} == {b.address}
        assert a.plugins[CONTEXTS].contexts.store.n_loads(A.digest) == 0
        assert b.plugins[CONTEXTS].contexts.store.n_loads(A.digest) == 1
        assert gate.contexts.loads[A.digest].n == 1
        gate.state.validate()

    on_cluster()


@gated()
async def test_two_clients_with_different_contexts(c, s, gate, a, b):
    async with Client(s.address, asynchronous=True) as other:
        mine = c.map(use, range(20), model=A)
        theirs = other.map(use, range(20), model=B)
        assert await c.gather(mine) == [(i, "a") for i in range(20)]
        assert await other.gather(theirs) == [(i, "b") for i in range(20)]
        more = c.map(use, range(20, 30), model=A)
    assert await c.gather(more) == [(i, "a") for i in range(20, 30)]
    for worker in (a, b):
        assert max(worker.plugins[CONTEXTS].contexts.store.n_loads(x.digest) for x in (A, B)) <= 1


@gated()
async def test_gather_direct(c, s, gate, a, b):
    futures = c.map(use, range(10), model=A)
    assert await c.gather(futures, direct=True) == [(i, "a") for i in range(10)]


def test_tls():
    """Everything over an encrypted cluster with temporary credentials."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            dashboard_address=":0",
            security=Security.temporary(),
            protocol="tls",
        ) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        assert client.submit(use, 1, model=A).result() == (1, "a")


@pytest.fixture
def started(tmp_path):
    """Start ``dask scheduler`` and ``dask worker`` processes; kill them afterwards."""
    processes = []

    def start(*arguments, blocked=False, env=()):
        environment = {**os.environ, **dict(env)}
        if blocked:
            (tmp_path / "without").mkdir(exist_ok=True)
            Path(tmp_path, "without", "sitecustomize.py").write_text(
                "import sys\nsys.modules['dask_pcm'] = None\n"  # as if it were not installed
            )
            environment["PYTHONPATH"] = str(tmp_path / "without")
        log = (tmp_path / f"log-{len(processes)}").open("w")
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        processes.append(process)
        return Path(log.name)

    yield start
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patient(10))
        process.kill()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def scheduler_at(started, *options, env=()):
    port = free_port()
    started(
        "dask_scheduler",
        "--host=127.0.0.1",
        f"--port={port}",
        "--no-dashboard",
        *options,
        env=env,
    )
    return f"tcp://127.0.0.1:{port}"


def test_a_preload_and_settings_for_a_cluster_that_others_start(started):
    """Clients that never call install find the gate, and the settings of the scheduler's side."""
    env = {"DASK_PCM__WORKER__LANES": "3"}
    address = scheduler_at(started, "--preload", "dask_pcm.preload", env=env)
    started(
        "dask_worker", address, "--nthreads=1", "--no-dashboard", "--preload", "dask_pcm.preload"
    )
    with Client(address) as client:
        client.wait_for_workers(1, timeout=patient(60))
        assert client.gather(client.map(use, range(6), model=A)) == [(i, "a") for i in range(6)]

        def seen(dask_worker):
            plugin = dask_worker.plugins[CONTEXTS]
            return plugin.config.n_lanes, plugin.contexts.store.n_loads(A.digest)

        assert set(client.run(seen).values()) == {(3, 1)}
        pcm.install(client)  # again: changes nothing
        assert set(client.run(seen).values()) == {(3, 1)}


def test_a_worker_without_the_package_gets_plain_tasks_and_says_so(started):
    address = scheduler_at(started, "--preload", "dask_pcm.preload")
    with_it = started("dask_worker", address, "--nthreads=1", "--no-dashboard", "--name=with")
    without = started(
        "dask_worker", address, "--nthreads=1", "--no-dashboard", "--name=without", blocked=True
    )
    with Client(address) as client:
        client.wait_for_workers(2, timeout=patient(60))
        addresses = {
            info["id"]: a for a, info in client.scheduler_info(n_workers=-1)["workers"].items()
        }
        futures = client.map(use, range(10), model=A)
        assert client.gather(futures) == [(i, "a") for i in range(10)]
        assert {w for ws in client.who_has(futures).values() for w in ws} == {addresses["with"]}
        plain = client.submit(inc, 1, workers=[addresses["without"]])
        assert plain.result(timeout=patient(30)) == 2
        with pytest.raises(pcm.PCMError, match=r"dask_pcm is missing on tcp://"):
            pcm.install(client)
    assert "dask_pcm is missing on tcp://" in without.read_text()
    assert "dask_pcm is missing" not in with_it.read_text()


def test_another_version_on_a_worker():
    """What arrives there says which version it found; it holds no context."""
    import pickle

    from dask_pcm.plugins import shipping as travel
    from dask_pcm.plugins.worker.plugin import ContextPlugin

    same = pickle.loads(_dumped(ContextPlugin()))
    assert isinstance(same, ContextPlugin) and same.config == ContextPlugin().config
    version, travel.__version__ = travel.__version__, "9.9.9"
    try:
        sent = _dumped(ContextPlugin())
    finally:
        travel.__version__ = version
    stub = pickle.loads(sent)
    assert not isinstance(stub, ContextPlugin) and stub.name == "pcm-absent"


def _dumped(plugin):
    from distributed.protocol.pickle import dumps

    return dumps(plugin)


def test_a_scheduler_without_the_package(started):
    """It cannot be installed on, and the message says where the package is missing."""
    port = free_port()
    started("dask_scheduler", "--host=127.0.0.1", f"--port={port}", "--no-dashboard", blocked=True)
    with (
        Client(f"tcp://127.0.0.1:{port}") as client,
        pytest.raises(pcm.PCMError, match="dask_pcm is missing on the scheduler"),
    ):
        pcm.install(client)


def test_release_for_users(own_client):
    model = pcm.Context(load, "released")
    assert pcm.release(model) == 0  # nothing is installed
    pcm.install(own_client)
    assert own_client.submit(use, 1, model).result() == (1, "released")
    assert pcm.release(pcm.Context(load, "released"), pcm.Context(load, "another")) == 1
    with pytest.raises(RecipeError, match=r"release takes a dask_pcm\.Context; found 'released'"):
        pcm.release("released")
    assert own_client.submit(use, 2, model).result() == (2, "released")
