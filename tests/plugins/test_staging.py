"""Contexts staged from peers: worker processes that each have a disk of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import dask
import pandas as pd
import pytest
from distributed import Client, LocalCluster, Security, wait
from distributed.core import rpc

import dask_pcm as pcm
from dask_pcm.ladder.files import transfer
from dask_pcm.ladder.files.cache import FileCache
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.plugins.worker import staging as staging_module
from dask_pcm.plugins.worker.plugin import CONTEXTS
from tests.support.gated import gated, poll
from tests.support.patience import patient, until

CHUNK = 256 << 10
N_CHUNKS = 24
ROLES = ("scheduler", "worker", "client")


def load(path):
    return Path(path).read_bytes()


def use(i, model):
    with pcm.acquire(model) as live:
        time.sleep(0.05)
        return len(live)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(N_CHUNKS * CHUNK - 7))
    return path


@pytest.fixture
def hosts(tmp_path, weights):
    """Start a cluster of processes; each worker has a disk of its own, as on a host of its own."""
    with contextlib.ExitStack() as stack:

        def start(n_workers, security=None, options=(), **settings):
            disk = {
                "pcm.ladder.disk.path": f"{tmp_path}/$PCM_TEST_HOST",
                "pcm.ladder.stage": "always",
            }
            stack.enter_context(dask.config.set({**disk, **settings}))
            scheduler = stack.enter_context(scheduler_process(tmp_path, security))
            client = stack.enter_context(Client(scheduler, security=security))
            pcm.install(client)
            client.workers = [
                stack.enter_context(worker_process(scheduler, f"host-{i}", security, options))
                for i in range(n_workers)
            ]
            client.wait_for_workers(n_workers, timeout=patient(60))
            return client

        yield start


@contextlib.contextmanager
def running(command, **env):
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def credentials(security, role):
    if security is None:
        return []
    return [
        f"--tls-ca-file={security.tls_ca_file}",
        f"--tls-cert={getattr(security, f'tls_{role}_cert')}",
        f"--tls-key={getattr(security, f'tls_{role}_key')}",
    ]


@contextlib.contextmanager
def scheduler_process(tmp_path, security):
    where = tmp_path / "scheduler.json"
    command = ["distributed.cli.dask_scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard"]
    command += [f"--scheduler-file={where}", *credentials(security, "scheduler")]
    command += ["--protocol=tls"] if security else []
    with running(command) as process:
        until(lambda: process.poll() is not None or (where.exists() and where.read_text()))
        yield json.loads(where.read_text())["address"]


@contextlib.contextmanager
def worker_process(scheduler, name, security=None, options=()):
    command = ["distributed.cli.dask_worker", scheduler, "--nthreads=1", "--no-dashboard"]
    command += ["--no-nanny", f"--name={name}", "--memory-limit=0", *options]
    command += credentials(security, "worker")
    with running(command, PCM_TEST_HOST=name) as process:
        yield process


def copied(client):
    """Chunks that came from the store, and from peers."""

    def count(dask_scheduler):
        found = dask_scheduler.plugins[GATE].staging.n_copied
        return found["store"], found.total() - found["store"]

    return client.run_on_scheduler(count)


def warm_all(client, weights, n_workers):
    model = pcm.Context(load, str(weights), files=[weights])
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])
    futures = [
        client.submit(use, i, model, workers=[address], pure=False)
        for i, address in enumerate(addresses)
    ]
    assert client.gather(futures) == [weights.stat().st_size] * n_workers
    return model


def test_the_store_is_read_once_and_peers_give_the_rest(hosts, weights, tmp_path):
    client = hosts(4)
    warm_all(client, weights, 4)
    from_store, from_peers = copied(client)
    assert N_CHUNKS <= from_store <= 1.2 * N_CHUNKS
    assert from_store + from_peers == 4 * N_CHUNKS
    for number in range(4):
        (blob,) = (tmp_path / f"host-{number}" / "blobs").glob("*.note")
        assert blob.with_suffix("").read_bytes() == weights.read_bytes()


def test_a_worker_that_joins_later_is_staged_from_peers(hosts, weights):
    client = hosts(2)
    model = warm_all(client, weights, 2)
    weights.unlink()  # the store is gone: peers have it
    (scheduler,) = [client.scheduler.address]
    with worker_process(scheduler, "late"):
        client.wait_for_workers(3, timeout=patient(60))
        (late,) = (
            address
            for address, about in client.scheduler_info(n_workers=-1)["workers"].items()
            if about["name"] == "late"
        )
        assert client.submit(use, 1, model, workers=[late]).result(60) == N_CHUNKS * CHUNK - 7


def test_a_peer_that_is_killed_in_the_midst(hosts, weights):
    client = hosts(3)
    model = pcm.Context(load, str(weights), files=[weights])
    first = client.submit(use, 0, model, pure=False)
    assert first.result(60)
    (holder,) = (about for about in client.who_has([first]).values())
    names = {a: w["name"] for a, w in client.scheduler_info(n_workers=-1)["workers"].items()}
    futures = client.map(use, range(60), model=model, pure=False)
    client.workers[int(names[holder[0]].rpartition("-")[2])].kill()
    wait(futures, timeout=patient(60))
    assert client.gather(futures) == [N_CHUNKS * CHUNK - 7] * 60


def test_with_the_clusters_certificates(hosts, weights, tmp_path):
    security = Security.temporary()
    files = [f"tls_{role}_{kind}" for role in ROLES for kind in ("cert", "key")]
    for name in ("tls_ca_file", *files):
        path = tmp_path / name
        path.write_text(getattr(security, name))
        setattr(security, name, str(path))
    client = hosts(2, security=security)
    warm_all(client, weights, 2)
    from_store, from_peers = copied(client)
    assert from_store + from_peers == 2 * N_CHUNKS and from_peers > 0


def test_where_only_dasks_ports_are_open(hosts, weights):
    """No port is left to serve on: chunks come over the workers' own comms."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"pcm.ladder.transfer.ports": taken.getsockname()[1]}
        client = hosts(2, **ports)
        warm_all(client, weights, 2)
        from_store, from_peers = copied(client)
        assert from_store + from_peers == 2 * N_CHUNKS and from_peers > 0

        def servers(dask_scheduler):
            return dict(dask_scheduler.plugins[GATE].staging._servers)

        assert not client.run_on_scheduler(servers)


def test_a_file_that_has_changed_is_said_and_not_waited_for(hosts, weights):
    client = hosts(2)
    model = pcm.Context(load, str(weights), files=[weights])
    weights.write_bytes(os.urandom(N_CHUNKS * CHUNK - 7))
    start = time.monotonic()
    with pytest.raises(pcm.PCMError, match=r"weights.bin' is not what it was"):
        client.submit(use, 1, model).result(60)
    assert time.monotonic() - start < staging_module.PATIENCE_S


def test_a_file_that_only_the_driver_sees_is_told_at_once_and_holds_up_nobody(hosts, weights):
    client = hosts(2)
    gone = pcm.Context(load, str(weights), files=[weights])
    other = weights.with_name("other.bin")
    other.write_bytes(os.urandom(N_CHUNKS * CHUNK))
    healthy = pcm.Context(load, str(other), files=[other])
    weights.unlink()
    start = time.monotonic()
    failing, fine = client.submit(use, 1, gone), client.submit(use, 2, healthy)
    assert fine.result(60) == N_CHUNKS * CHUNK
    with pytest.raises(pcm.PCMError, match=r"cannot be read on this worker.*No such file"):
        failing.result(60)
    assert time.monotonic() - start < staging_module.PATIENCE_S


def test_a_store_that_stops_answering_is_said(hosts, weights, tmp_path):
    """It answers for what a digest takes, and for some chunks; then it says nothing any more."""
    with silent_store(tmp_path, n_answers=60) as (store, url):
        model = pcm.Context(load, url, files=[url])
        store.n_answers = store.n_asked + 10
        client = hosts(1, **{"pcm.ladder.store.timeout": "500ms"})
        with pytest.raises(pcm.errors.LoadError) as caught:
            client.submit(use, 0, model).result(60)
    assert "weights.bin" in str(caught.value)
    assert "no answer within 0.5 s" in str(caught.value)


@contextlib.contextmanager
def silent_store(folder, n_answers):
    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            store.n_asked += 1
            if store.n_asked > store.n_answers:
                over.wait(patient(60))
                return
            first, _, last = self.headers.get("Range", "bytes=0-").split("=")[1].partition("-")
            data = (folder / "weights.bin").read_bytes()
            part = data[int(first) : int(last) + 1 if last else len(data)]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    over = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as store:
        store.daemon_threads = True
        store.n_asked, store.n_answers = 0, n_answers
        threading.Thread(target=store.serve_forever, daemon=True).start()
        yield store, f"http://127.0.0.1:{store.server_port}/weights.bin"
        over.set()
        store.shutdown()


def answer(frame, live):
    time.sleep(0.01)
    return frame[["id"]].assign(n=len(live))


def test_with_its_scheduler_gone_the_run_goes_on_with_what_is_on_the_disks(
    hosts, weights, tmp_path, claims
):
    """Its workers end; new ones find the weights on the disk rung, and the run resumes."""
    frame = pcm.map_partitions(
        answer,
        pcm.read_parquet(claims(n_files=8)),
        context=pcm.Context(load, str(weights), files=[weights]),
        meta={"id": "i8", "n": "i8"},
        batch_rows=1,
    )
    out = tmp_path / "out"
    # How long a client looks for its scheduler before it gives its futures up.
    first = hosts(2, **{"distributed.comm.timeouts.connect": "3s"})
    run = pcm.write_parquet(frame, out, client=first, wait=False, progress=False)
    until(lambda: run.progress.done >= 100, 60)
    os.kill(first.run_on_scheduler(os.getpid), signal.SIGKILL)
    for worker in first.workers:
        worker.wait(patient(60))
    with pytest.raises(Exception):  # noqa: B017 - however Dask says it
        run.wait(patient(60))
    (tmp_path / "scheduler.json").unlink()
    second = hosts(2)
    report = pcm.write_parquet(frame, out, client=second, progress=False).report
    assert report.rows == 400 and report.rows_resumed >= 100
    assert copied(second) == (0, 0)
    assert sorted(pd.read_parquet(out).id) == list(range(400))


def test_a_second_file_long_after_the_first_comes_from_peers_too(hosts, weights):
    """Connections that were idle for long are made anew, and nobody is blamed."""
    client = hosts(2)
    client.run(setattr, transfer, "TIMEOUT_S", 1.0)
    warm_all(client, weights, 2)
    time.sleep(2)  # longer than a server keeps an idle connection
    other = weights.with_name("other.bin")
    other.write_bytes(os.urandom(N_CHUNKS * CHUNK))
    first, second = sorted(client.scheduler_info(n_workers=-1)["workers"])
    model = pcm.Context(load, str(other), files=[other])
    for worker in (first, second):
        client.submit(use, 1, model, workers=[worker], pure=False).result(60)
    from_store, from_peers = copied(client)
    assert from_store + from_peers == 4 * N_CHUNKS and from_peers >= N_CHUNKS + 1
    failures = client.run_on_scheduler(
        lambda dask_scheduler: dict(
            dask_scheduler.plugins[GATE].staging._plan._back_offs.n_failures
        )
    )
    assert not failures


@gated(1)
async def test_a_worker_that_hears_nothing_helps_itself(c, s, gate, a):
    """The scheduler's answer is lost."""
    with pytest.MonkeyPatch.context() as patched, contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        patched.setenv("XDG_CACHE_HOME", scratch)
        patched.setattr(staging_module, "PATIENCE_S", 0.5)
        patched.setattr(gate.staging, "dispatch", lambda: None)
        path = Path(scratch, "weights.bin")
        path.write_bytes(os.urandom(3 * CHUNK))
        staging = a.plugins[CONTEXTS].staging
        staging._config = dataclasses.replace(
            staging._config, disk_path=f"{scratch}/disk", is_staged_always=True
        )
        model = pcm.Context(load, str(path), files=[path])
        await poll(lambda: a.plugins[CONTEXTS].fetcher._access is not None, 5)
        assert await c.submit(use, 1, model) == 3 * CHUNK


def test_workers_hand_out_blobs_and_nothing_else(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    settings = dask.config.set({"pcm.ladder.disk.path": str(tmp_path / "disk")})
    options = {"processes": False, "dashboard_address": ":0", "threads_per_worker": 1}
    with settings, LocalCluster(n_workers=1, **options) as cluster, Client(cluster) as client:
        pcm.install(client)
        FileCache(tmp_path / "disk")
        (worker,) = client.scheduler_info()["workers"]

        async def ask(**asked):
            async with rpc(worker) as peer:
                return await peer.pcm_chunk(chunk=0, start=0, **asked)

        for name in (str(secret), "../../secret", "/etc/passwd", None, "0" * 31 + "/"):
            assert client.sync(ask, blob=name, n_bytes=6) is None
        assert client.sync(ask, blob="0" * 32, n_bytes=1 << 30) is None
        held = tmp_path / "disk" / "blobs" / ("0" * 32)
        held.write_bytes(b"a blob")
        assert client.sync(ask, blob="0" * 32, n_bytes=6) == b"a blob"
