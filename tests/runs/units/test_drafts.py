"""Texts that are generated go on from their tokens, after a process death and after a notice."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from distributed import Client, WorkerPlugin

import dask_pcm as pcm
from dask_pcm.plugins.worker.plugin import CONTEXTS
from tests.conftest import spawning, validated_cluster
from tests.support import models as tiny
from tests.support.jobs import found_in, write
from tests.support.patience import patient, until

N_ROWS, N_TOKENS = 8, 200
INTERVAL_S, TOKEN_S = 0.3, 0.004
#: Tokens in an interval and a look at the clock; as many are computed again at most, twice for a
#: machine that is busy.
MOST_AGAIN = 2 * (INTERVAL_S + 0.2) / TOKEN_S


class Slowly(WorkerPlugin):
    """Tokens take time, and are counted; drafts are kept more often."""

    name = "slowly"

    def __init__(self, log):
        self.log = str(log)

    def setup(self, worker):
        import time

        from dask_pcm.inference.engine.rows import Generated
        from dask_pcm.runs.units import flight

        flight.DRAFT_S, flight._POLL_S = INTERVAL_S, 0.1
        counted = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        append = Generated.append

        def counting(row, token):
            time.sleep(TOKEN_S)
            os.write(counted, b".")
            return append(row, token)

        Generated.append = counting


@pytest.fixture
def llm(tmp_path, monkeypatch):
    monkeypatch.setattr("dask_pcm.inference.llm.misfits", lambda *given: [])
    model = tiny.llama(max_position_embeddings=512)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return pcm.LLM(tiny.saved(tmp_path / "model", model), device="cpu")


@pytest.fixture
def texts(tmp_path, llm):
    """A job: rows whose texts are as long as they may be, mostly."""
    rows = pd.DataFrame({"id": range(N_ROWS), "topic": [f"the moon {k}" for k in range(N_ROWS)]})
    rows.to_parquet(tmp_path / "in.parquet")
    ddf = pcm.read_parquet(tmp_path / "in.parquet")
    return pcm.generate(ddf, llm, prompt="{topic}", max_tokens=N_TOKENS, batch_rows=4)


def n_counted(log):
    return Path(log).stat().st_size if Path(log).exists() else 0


def same_texts(out, expected):
    pd.testing.assert_frame_equal(found_in(out), expected.sort_values("id", ignore_index=True))


@pytest.fixture(params=["folder", "object store"])
def out(request, tmp_path):
    """Where the output is."""
    return (
        request.getfixturevalue("bucket") if request.param == "object store" else tmp_path / "out"
    )


@pytest.mark.timeout(300)
def test_a_killed_process_computes_again_what_an_interval_has(texts, tmp_path, out):
    log = tmp_path / "tokens"
    expected = texts.compute(scheduler="sync")
    n_all = int(expected.n_tokens.sum())
    assert n_all > N_ROWS * N_TOKENS / 2
    with spawning(), validated_cluster(n_workers=1) as cluster, Client(cluster) as client:
        client.register_plugin(Slowly(log))
        pcm.install(client)
        run = write(texts, out, wait=False)
        until(lambda: n_counted(log) > n_all / 2, patient(120))
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        report = run.wait(patient(120))
    assert report.rows_failed == 0
    same_texts(out, expected)
    assert n_all <= n_counted(log) + N_ROWS <= n_all + MOST_AGAIN + N_ROWS


@pytest.mark.timeout(300)
def test_a_worker_under_notice_leaves_its_tokens_to_another(texts, tmp_path, out):
    log = tmp_path / "tokens"
    expected = texts.compute(scheduler="sync")
    n_all = int(expected.n_tokens.sum())

    def notice(left_s, dask_worker):
        dask_worker.plugins[CONTEXTS].drain.begin(left_s)

    with spawning(), validated_cluster(n_workers=1) as cluster, Client(cluster) as client:
        client.register_plugin(Slowly(log))
        pcm.install(client)
        run = write(texts, out, wait=False)
        until(lambda: n_counted(log) > n_all / 4, patient(120))
        (old,) = client.scheduler_info()["workers"]
        cluster.scale(2)
        client.wait_for_workers(2, patient(60))
        client.run(partial(notice, 3.5), workers=[old])
        report = run.wait(patient(120))
    assert report.rows_failed == 0
    same_texts(out, expected)
    assert n_counted(log) <= n_all + MOST_AGAIN
