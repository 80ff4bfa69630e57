"""Clusters of pools, on this machine's processes and on a Slurm of its own."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack

import dask
import pytest

import dask_pcm as pcm
from tests.support import slurm as private_slurm
from tests.support.needs import lacking


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Connection files and logs of jobs are the test's own; batch systems are asked often."""
    monkeypatch.setenv("DASK_PCM_HOME", str(tmp_path / "home"))
    with dask.config.set({"pcm.pools.poll-interval": "1s"}):
        yield tmp_path / "home"


@pytest.fixture
def cluster():
    """Make clusters; their jobs must have ended when they are closed."""
    made = []

    def make(pools=None, **options):
        made.append(pcm.PoolCluster(pools or {"cpu": pcm.Pool(batch="local")}, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def _slurm(tmp_path_factory):
    with ExitStack() as stack:
        why, conf = private_slurm.missing(), None
        if not why:
            try:
                folder = tmp_path_factory.mktemp("slurm")
                conf = stack.enter_context(private_slurm.running(folder))
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                why = f"it does not start here ({error})"
        if why:
            lacking("slurm", f"no Slurm: {why}")
        yield conf


@pytest.fixture
def slurm(_slurm, monkeypatch):
    """A private Slurm, which this process's commands talk to."""
    monkeypatch.setenv("SLURM_CONF", str(_slurm))
    return _slurm


def slow(frame, model):
    time.sleep(0.1)
    return frame[["id"]]


@pytest.fixture
def job(claims):
    """A job of 400 rows in batches of four, each of which takes a tenth of a second."""
    return pcm.map_partitions(
        slow,
        pcm.read_parquet(claims(n_files=4, n_rows=100)),
        context=pcm.Context(dict, [("a", 1)]),
        meta={"id": "i8"},
        batch_rows=4,
    )
