"""Functions that serve several batches at a time: a stand-in engine, in real workers."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
from distributed import Client, get_worker

import dask_pcm as pcm
from tests.conftest import spawning, validated_cluster
from tests.support.jobs import found_in, write

META = {"id": "i8", "twice": "i8"}
N_ROWS, BATCH_ROWS = 240, 4


class Model:
    """A live object that an engine serves."""

    is_attended = True
    facts = {"device": "stand-in"}  # noqa: RUF012

    def __init__(self, log, kills=(), hangs=(), dies_at=None):
        self.log, self.kills, self.hangs, self.dies_at = log, set(kills), set(hangs), dies_at

    def attend(self):
        return Engine(self)


class Engine:
    """Computes rows of many batches in one call, on a thread of its own; results out of order."""

    n_bytes = 0
    n_rows = 100

    def __init__(self, model):
        self._log, self._kills, self._model = model.log, model.kills, model
        self._waiting = queue.SimpleQueue()
        self._random = random.Random(0)
        self._is_alone = False

    def start(self):
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, request):
        future = Future()
        self._waiting.put((*request, future))
        return future

    def close(self):
        pass

    @contextmanager
    def alone(self):
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def _serve(self):
        while True:
            taken = [self._waiting.get()]
            time.sleep(0.02)  # others arrive meanwhile
            while not self._waiting.empty() and len(taken) < 8:
                taken.append(self._waiting.get())
            self._call(taken)

    def _call(self, taken):
        ids = [i for batch, _, _ in taken for i in batch]
        sizes = [len(batch) for batch, _, _ in taken]
        tasks = sorted({task for _, task, _ in taken})
        line = {
            "pid": os.getpid(),
            "ids": ids,
            "tasks": tasks,
            "sizes": sizes,
            "alone": self._is_alone,
        }
        with open(self._log, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._kills & set(ids):
            os.kill(os.getpid(), signal.SIGKILL)
        self._random.shuffle(taken)
        for batch, _, future in taken:
            if self._model.hangs & set(batch):
                continue  # its future is never done
            if self._dies(batch):
                future.set_exception(RuntimeError("CUDA error: device-side assert triggered"))
            elif 55 in batch:
                future.set_exception(SystemExit("row 55 ends Python"))
            elif 77 in batch:
                future.set_exception(ValueError("row 77 is bad"))
            else:
                future.set_result([2 * i for i in batch])

    def _dies(self, batch):
        """Whether the device is lost at this batch: once, in the first process that computes it."""
        if self._model.dies_at not in batch:
            return False
        try:
            open(f"{self._log}.dead", "x").close()
        except FileExistsError:
            return False
        return True


class Twice:
    """What an engine serves: hands rows over, and makes a frame of the answers."""

    is_served = True

    def __call__(self, frame, engine):
        return self.submit(frame, engine).result()

    def submit(self, frame, engine):
        if 99 in frame["id"].values:
            raise ValueError("row 99 is not even submitted")
        task = str(get_worker().get_current_task())
        answers, done = engine.submit((frame["id"].tolist(), task)), Future()

        def finish(future):
            if error := future.exception():
                done.set_exception(error)
            else:
                done.set_result(frame[["id"]].assign(twice=future.result()))

        answers.add_done_callback(finish)
        return done


@pytest.fixture(scope="module")
def cluster():
    with (
        spawning(),
        validated_cluster(n_workers=1, memory_limit="4GiB") as cluster,
    ):
        yield cluster


@pytest.fixture
def served(cluster, claims, tmp_path):
    """Run a job through the engine; returns the rows, the report and the engine's calls."""

    def run(n_rows=N_ROWS, batch_timeout=None, **model):
        log = tmp_path / "calls"
        engine = pcm.Context(Model, str(log), exclusive=False, **model)
        frame = pcm.read_parquet(claims(n_files=4, n_rows=n_rows // 4))
        job = pcm.map_partitions(
            Twice(),
            frame,
            context=engine,
            meta=META,
            batch_rows=BATCH_ROWS,
            batch_timeout=batch_timeout,
        )
        with Client(cluster) as client:
            pcm.install(client)
            report = write(job, tmp_path / "out").report
        calls = [json.loads(line) for line in log.read_text().splitlines()]
        return found_in(tmp_path / "out"), report, calls

    return run


def test_rows_of_several_batches_are_in_one_call_and_each_is_in_the_output_once(served):
    found, report, calls = served()
    assert found.id.tolist() == list(range(N_ROWS))
    failed = found[found.error.notna()]
    assert failed.id.tolist() == [55, 77, 99]
    assert [text.split(": ", 1)[1] for text in failed.error] == [
        "Twice raised SystemExit('row 55 ends Python')",
        "row 77 is bad",
        "row 99 is not even submitted",
    ]
    good = found[found.error.isna()]
    assert (good.twice == 2 * good.id).all()
    assert (report.rows, report.rows_failed) == (N_ROWS, 3)
    assert max(len(call["ids"]) for call in calls) > BATCH_ROWS
    assert max(size for call in calls for size in call["sizes"]) <= BATCH_ROWS
    # A unit whose last rows are being served has left its lane to the next one.
    assert any(len(call["tasks"]) > 1 for call in calls)
    assert report.ran_on == {"stand-in": N_ROWS}


def test_a_row_that_kills_the_engine_fails_and_the_others_get_answers(served):
    found, _, calls = served(kills=[130])
    assert found.id.tolist() == list(range(N_ROWS))
    failed = found[found.error.notna()]
    assert failed.id.tolist() == [55, 77, 99, 130]
    assert "Row 130 of the input" in failed.error.iloc[3]
    good = found[found.error.isna()]
    assert (good.twice == 2 * good.id).all()
    # Found by bisection: suspects are in calls of their own.
    assert [130] in [call["ids"] for call in calls if call["alone"]]
    deaths = sum(130 in call["ids"] for call in calls)
    assert deaths <= 14


def test_a_row_that_is_never_answered_fails_after_its_time(served):
    found, _, _ = served(n_rows=60, hangs=[30], batch_timeout=1.0)
    assert found.id.tolist() == list(range(60))
    failed = found[found.error.notna()]
    assert failed.id.tolist() == [30, 55]
    assert "took longer than batch_timeout (1 s)" in failed.error.iloc[0]


def test_a_device_that_is_lost_costs_a_process_and_no_answer(served):
    found, _, calls = served(dies_at=150)
    assert found.id.tolist() == list(range(N_ROWS))
    assert found[found.error.notna()].id.tolist() == [55, 77, 99]
    assert len({call["pid"] for call in calls}) == 2


def test_a_context_that_is_exclusive_is_refused(claims):
    frame = pcm.read_parquet(claims())
    with pytest.raises(pcm.errors.SchemaError, match="exclusive=False"):
        pcm.map_partitions(
            Twice(), frame, context=pcm.Context(Model, "log"), meta=META, batch_rows=BATCH_ROWS
        )
