"""Workers that reach the scheduler but not each other: a bridge whose ports are isolated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import dask
import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.plugins.worker.staging import PATIENCE_S
from tests.support.patience import patient, until

CHUNK, N_CHUNKS, N_HOSTS = 256 << 10, 24, 3
NETWORK = "10.78.5"


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@pytest.fixture
def isolated():
    """Namespaces whose packets reach this host; those to each other are dropped without a word."""
    names = [f"pcmfw{os.getpid()}n{k}" for k in range(1, N_HOSTS + 1)]
    bridge = f"pcmfw{os.getpid() % 100_000}"
    with ExitStack() as stack:
        try:
            ip("link", "add", bridge, "type", "bridge")
            stack.callback(ip, "link", "del", bridge)
            ip("addr", "add", f"{NETWORK}.254/24", "dev", bridge)
            ip("link", "set", bridge, "up")
            for k, name in enumerate(names, 1):
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
                link = f"{bridge}v{k}"
                ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", link, "master", bridge, "up")
                ip("link", "set", link, "type", "bridge_slave", "isolated", "on")
                ip("-n", name, "addr", "add", f"{NETWORK}.{k}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
            for name in names:  # known addresses: otherwise connections would be refused at once
                for k in range(1, N_HOSTS + 1):
                    mac = f"02:00:00:00:00:{k:02x}"
                    ip(
                        "-n",
                        name,
                        "neigh",
                        "replace",
                        f"{NETWORK}.{k}",
                        "lladdr",
                        mac,
                        "dev",
                        "eth0",
                    )
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
        yield names


def load(path):
    return len(open(path, "rb").read())


def use(_, model):
    with pcm.acquire(model) as n_bytes:
        return n_bytes


def started(stack, *command, **env):
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def test_files_come_from_the_store_with_one_warning_and_no_long_wait(
    isolated, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))
    paths = [tmp_path / f"weights{k}.bin" for k in range(3)]
    for path in paths:
        path.write_bytes(os.urandom(N_CHUNKS * CHUNK))
    settings = {"pcm.ladder.disk.path": f"{tmp_path}/$PCM_TEST_HOST", "pcm.ladder.stage": "always"}
    where = tmp_path / "scheduler.json"
    dask_command = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    workers, waits = [], []
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        options = [f"--host={NETWORK}.254", "--port=0", "--no-dashboard"]
        started(stack, *dask_command, *options, f"--scheduler-file={where}")
        until(lambda: where.exists() and where.read_text())
        address = json.loads(where.read_text())["address"]
        client = stack.enter_context(Client(address))
        pcm.install(client)
        for name in isolated:
            command = ["ip", "netns", "exec", name, sys.executable, "-m"]
            command += ["distributed.cli.dask_worker", address, "--nthreads=1", "--no-nanny"]
            command += [f"--name={name}", "--memory-limit=0", "--no-dashboard"]
            workers.append(started(stack, *command, PCM_TEST_HOST=name))
        client.wait_for_workers(N_HOSTS, timeout=patient(60))
        info = client.scheduler_info(n_workers=-1)["workers"]
        by_name = {about["name"]: address for address, about in info.items()}
        for path in paths:
            model = pcm.Context(load, str(path), files=[path])
            for name in isolated:  # the first is the source that others are sent to
                begun = time.monotonic()
                future = client.submit(use, 0, model, workers=[by_name[name]], pure=False)
                assert future.result(patient(120)) == N_CHUNKS * CHUNK
                waits.append(time.monotonic() - begun)

        def from_peers(dask_scheduler):
            found = dask_scheduler.plugins[GATE].staging.n_copied
            return found.total() - found["store"]

        assert client.run_on_scheduler(from_peers) == 0
    firsts, rest = waits[:N_HOSTS], waits[N_HOSTS:]
    assert max(firsts) < patient(PATIENCE_S)
    assert max(rest) < min(firsts[1:])  # what is known costs nothing
    said = []
    for worker in workers:
        worker.kill()
        said.append(worker.communicate()[1].count("is there a firewall between them?"))
    assert said == [0, 1, 1]
