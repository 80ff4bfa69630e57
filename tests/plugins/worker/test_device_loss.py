"""Devices that are lost to their process: what a driver says, raised where there is no device."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.ladder.objects.tensors import is_sticky
from tests.conftest import validated_cluster
from tests.support.patience import until

ASSERT = "CUDA error: device-side assert triggered"


@pytest.fixture
def client():
    with validated_cluster() as cluster, Client(cluster) as client:
        pcm.install(client)
        yield client


def load(log):
    with Path(log).open("a") as file:
        print("load", os.getpid(), file=file)
    return {}


def noted(log, word):
    path = Path(log)
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1] for line in lines if line.startswith(word)]


def ask(i, context, poison, n_times, log):
    """Lose the device so often in tasks of one number; then nothing runs there any more."""
    with pcm.acquire(context) as state:
        if state.get("is_lost"):
            raise RuntimeError(ASSERT)
        if i == poison and len(noted(log, "lost")) < n_times:
            state["is_lost"] = True
            with Path(log).open("a") as file:
                print("lost", os.getpid(), file=file)
            raise RuntimeError(ASSERT)
        return i


def await_end(pid):
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_lost_device_costs_a_process_but_no_answer(client, tmp_path):
    log = str(tmp_path / "log")
    context = pcm.Context(load, log)
    futures = client.map(ask, range(40), context=context, poison=7, n_times=1, log=log)
    assert client.gather(futures) == list(range(40))
    (lost,) = noted(log, "lost")
    await_end(lost)
    assert len(noted(log, "load")) == len(set(noted(log, "load")))  # once a process


def test_a_task_that_does_it_again_and_again_ends_and_the_others_do_not(client, tmp_path):
    log = str(tmp_path / "log")
    context = pcm.Context(load, log)
    futures = client.map(ask, range(10), context=context, poison=3, n_times=99, log=log)
    with pytest.raises(pcm.errors.DeviceError, match=r"lost 3 worker processes.*device-side"):
        futures[3].result(60)
    del futures[3]
    assert client.gather(futures) == [0, 1, 2, *range(4, 10)]
    assert len(noted(log, "lost")) == 3


def test_without_a_nanny_the_task_is_told(tmp_path):
    log = str(tmp_path / "log")
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        future = client.submit(ask, 1, pcm.Context(load, log), poison=1, n_times=1, log=log)
        with pytest.raises(pcm.errors.DeviceError, match="no nanny"):
            future.result(30)


def verdicts(frame, state, log):
    if state.get("is_lost"):
        raise RuntimeError(ASSERT)
    if not noted(log, "lost"):
        state["is_lost"] = True
        with Path(log).open("a") as file:
            print("lost", os.getpid(), file=file)
        raise RuntimeError(ASSERT)
    return frame[["id"]]


def test_by_rows_no_row_is_blamed_for_it(client, tmp_path, claims):
    log = str(tmp_path / "log")
    frame = pcm.map_partitions(
        verdicts,
        pcm.read_parquet(claims()),
        log,
        context=pcm.Context(load, log),
        meta={"id": "i8"},
        batch_rows=8,
    )
    run = pcm.write_parquet(frame, tmp_path / "out", client=client, progress=False)
    found = pd.read_parquet(tmp_path / "out")
    assert sorted(found.id) == list(range(200))
    assert found.error.isna().all() and run.report.rows_failed == 0
    assert len(noted(log, "lost")) == 1


def load_badly(log):
    if not noted(log, "lost"):
        with Path(log).open("a") as file:
            print("lost", os.getpid(), file=file)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return load(log)


def test_lost_while_loading_the_process_ends_too(client, tmp_path):
    log = str(tmp_path / "log")
    context = pcm.Context(load_badly, log)
    futures = client.map(ask, range(10), context=context, poison=None, n_times=0, log=log)
    assert client.gather(futures) == list(range(10))
    (lost,) = noted(log, "lost")
    await_end(lost)


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (RuntimeError(ASSERT), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("HIP error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: invalid argument"), False),
        (RuntimeError("the address space of the user is empty"), False),
        (ValueError(ASSERT), False),
        (None, False),
    ],
)
def test_which_errors_mean_that(error, is_so):
    assert is_sticky(error) is is_so
    wrapped = ValueError("in a batch")
    wrapped.__cause__ = error
    assert is_sticky(wrapped) is is_so


def test_errors_that_came_from_each_other_are_looked_at_once():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert not is_sticky(one)
