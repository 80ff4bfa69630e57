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

import pytest
from distributed import Client

import dask_pcm as pcm
from tests.conftest import spawning, validated_cluster
from tests.support.jobs import found_in, write

META = {"id": "i8", "twice": "i8"}
N_ROWS, BATCH_ROWS = 240, 4


class Model:
    """A live object that an engine serves."""

    def __init__(self, log, kills=()):
        self.log, self.kills = log, set(kills)

    def attend(self):
        return Engine(self)


class Engine:
    """Computes rows of many batches in one call, on a thread of its own; results out of order."""

    n_bytes = 0
    n_rows = 100

    def __init__(self, model):
        self._log, self._kills = model.log, model.kills
        self._waiting = queue.SimpleQueue()
        self._random = random.Random(0)

    def start(self):
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, request):
        future = Future()
        self._waiting.put((*request, future))
        return future

    def close(self):
        pass

    def _serve(self):
        while True:
            taken = [self._waiting.get()]
            time.sleep(0.02)  # others arrive meanwhile
            while not self._waiting.empty() and len(taken) < 8:
                taken.append(self._waiting.get())
            self._call(taken)

    def _call(self, taken):
        ids = [i for batch, _, _ in taken for i in batch]
        line = {"pid": os.getpid(), "ids": ids, "units": sorted({unit for _, unit, _ in taken})}
        with open(self._log, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._kills & set(ids):
            os.kill(os.getpid(), signal.SIGKILL)
        self._random.shuffle(taken)
        for batch, _, future in taken:
            if 77 in batch and len(batch) > 0:
                future.set_exception(ValueError("row 77 is bad"))
            else:
                future.set_result([2 * i for i in batch])


class Twice:
    """What an engine serves: hands rows over, and makes a frame of the answers."""

    def __call__(self, frame, engine):
        return self.submit(frame, engine).result()

    def submit(self, frame, engine):
        answers, done = (
            engine.submit((frame["id"].tolist(), int(frame["id"].iloc[0]) // 60)),
            Future(),
        )

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

    def run(kills=(), n_rows=N_ROWS):
        log = tmp_path / "calls"
        engine = pcm.Context(Model, str(log), list(kills), exclusive=False)
        frame = pcm.read_parquet(claims(n_files=4, n_rows=n_rows // 4))
        job = pcm.map_partitions(Twice(), frame, context=engine, meta=META, batch_rows=BATCH_ROWS)
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
    assert failed.id.tolist() == [77] and "row 77 is bad" in failed.error.iloc[0]
    good = found[found.error.isna()]
    assert (good.twice == 2 * good.id).all()
    assert (report.rows, report.rows_failed) == (N_ROWS, 1)
    assert max(len(call["ids"]) for call in calls) > BATCH_ROWS
    assert any(len(call["units"]) > 1 for call in calls)


def test_a_row_that_kills_the_engine_fails_and_the_others_get_answers(served):
    found, _, calls = served(kills=[130])
    assert found.id.tolist() == list(range(N_ROWS))
    failed = found[found.error.notna()]
    assert failed.id.tolist() == [77, 130]
    assert "Row 130 of the input" in failed.error.iloc[1]
    good = found[found.error.isna()]
    assert (good.twice == 2 * good.id).all()
    # Found by bisection: suspects are in calls of their own.
    assert [130] in [call["ids"] for call in calls]
    deaths = sum(130 in call["ids"] for call in calls)
    assert deaths <= 14
