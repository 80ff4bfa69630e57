"""A run that loses what it depends on: the scheduler, the client, the cluster, the store."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.errors import OutputError, PCMError
from dask_pcm.ledger.storage.object_store import ObjectStore

ROOT = Path(__file__).parents[2]
PATIENCE_S = 90.0


def load():
    return "model"


def slow(frame, model):
    time.sleep(0.01 * len(frame))
    return frame[["id"]]


def job(given):
    frame = pcm.read_parquet(given)
    return pcm.map_partitions(
        slow, frame, context=pcm.Context(load), meta={"id": "i8"}, batch_rows=5
    )


@contextmanager
def threads():
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def in_the_middle(given, out, client):
    """A run that has committed something, and has more to do."""
    run = pcm.write_parquet(job(given), out, wait=False, client=client)
    deadline = time.monotonic() + PATIENCE_S
    while not run.progress.done:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return run


def resumed(given, out):
    """Rows of the whole, and those that were there, once the same is run again."""
    with threads() as client:
        report = pcm.write_parquet(job(given), out, progress=False, client=client).report
    ids = pd.read_parquet(out)["id"]
    assert sorted(ids) == list(range(200))
    return report.rows, report.rows_resumed


@pytest.mark.parametrize("how", ["client", "cluster"])
def test_a_client_or_a_cluster_that_is_closed(claims, tmp_path, how):
    given, out = claims(), str(tmp_path / "out")
    with threads() as client:
        run = in_the_middle(given, out, client)
        (client if how == "client" else client.cluster).close()
        with pytest.raises(PCMError, match="rerun the same call to resume"):
            run.wait(PATIENCE_S)
    assert pcm.attach(out).status == "failed"
    n_rows, n_resumed = resumed(given, out)
    assert n_rows == 200 and 0 < n_resumed < 200


@pytest.fixture
def scheduler(tmp_path):
    """A scheduler in a process of its own, with a worker; it may be killed."""
    place, processes = tmp_path / "scheduler.json", []

    def start(*arguments):
        command = [sys.executable, "-m", *arguments, f"--scheduler-file={place}", "--no-dashboard"]
        with (tmp_path / "log").open("a") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT))

    start("distributed.cli.dask_scheduler", "--host=127.0.0.1", "--port=0")
    start("distributed.cli.dask_worker", "--nthreads=1")
    deadline = time.monotonic() + PATIENCE_S
    while not place.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield place, processes[0], tmp_path / "log"
    for process in reversed(processes):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def test_a_scheduler_that_is_killed(claims, tmp_path, scheduler):
    """The run says so, and its worker ends without loading anything again."""
    given, out = claims(), str(tmp_path / "out")
    place, process, log = scheduler
    with Client(scheduler_file=str(place), timeout=PATIENCE_S) as client:
        client.wait_for_workers(1, PATIENCE_S)
        (pid,) = client.run(os.getpid).values()
        run = in_the_middle(given, out, client)
        client._timeout = 2  # so long it tries to reconnect
        process.kill()
        with pytest.raises(PCMError, match="rerun the same call to resume"):
            run.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "is not installed on this cluster" not in log.read_text()
    n_rows, n_resumed = resumed(given, out)
    assert n_rows == 200 and 0 < n_resumed < 200


@pytest.fixture
def no_instances():
    """fsspec keeps filesystems: neither those of other stores here, nor this one later."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_stops(claims, no_instances):
    from moto.server import ThreadedMotoServer

    given = claims()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched, threads() as client:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "testing")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem().mkdir("stops")
        run = in_the_middle(given, "s3://stops/out", client)
        server.stop()
        with pytest.raises(OutputError, match="The store of 's3://stops/out' does not answer"):
            run.wait(PATIENCE_S)


def test_a_folder_that_is_removed(claims, tmp_path):
    given, out = claims(), tmp_path / "out"
    with threads() as client:
        run = in_the_middle(given, out, client)
        out.rename(tmp_path / "elsewhere")  # in one step: workers write there
        with pytest.raises(PCMError, match="or its folder was removed"):
            run.wait(PATIENCE_S)
    assert resumed(given, out) == (200, 0)


def test_an_input_store_that_does_not_answer(claims, tmp_path):
    """As a function of partitions over it sees it, on a worker."""

    def fetch(frame, model):
        from botocore.exceptions import EndpointConnectionError

        raise EndpointConnectionError(endpoint_url="http://store")

    made = pcm.map_partitions(
        fetch, pcm.read_parquet(claims()), context=pcm.Context(load), meta={"id": "i8"}
    )
    with (
        threads() as client,
        pytest.raises(PCMError, match="rerun the same call to resume") as found,
    ):
        pcm.write_parquet(made, tmp_path / "out", progress=False, client=client)
    assert "EndpointConnectionError: Could not connect" in str(found.value)
    assert type(found.value.__cause__).__name__ == "EndpointConnectionError"


@pytest.mark.parametrize(
    ("error", "is_store"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (FileNotFoundError("part"), False),
        (PermissionError("part"), False),
        (ValueError("not of a store"), False),
    ],
)
def test_what_is_said_of_a_file_is_not_said_of_its_store(error, is_store):
    class Files:
        protocol = "s3"

        def cat_file(self, path):
            raise error

    store = ObjectStore(Files(), "s3://bucket/out")
    assert store.protocol == "s3"
    with pytest.raises(OutputError if is_store else type(error)) as found:
        store.cat_file("s3://bucket/out/part")
    assert isinstance(found.value, OutputError) is is_store
