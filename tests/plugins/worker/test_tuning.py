"""A worker's process is set up for inference while contexts are in use, and only then."""

from __future__ import annotations

import os
import sys
import threading
import time

import dask
import psutil
import pytest
from distributed import get_worker
from distributed.core import Status
from tornado.ioloop import PeriodicCallback

import dask_pcm as pcm
from dask_pcm.plugins.worker import tuning as tuning_module
from dask_pcm.plugins.worker.tuning import Tuning

MIB = 1 << 20
NAMES = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")


class Living:
    """A worker of this process."""

    status = Status.running

    def __init__(self, sample_ms=10):
        self.periodic_callbacks = {"profile": PeriodicCallback(lambda: None, sample_ms)}

    @property
    def sample_ms(self):
        return self.periodic_callbacks["profile"].callback_time


@pytest.fixture
def tuning(monkeypatch):
    """Of this process, with allocator and clock of the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")  # also after the test
    made = Tuning()
    made.kept = []
    for name, value in (("keep_freed_memory", True), ("free_memory_as_before", False)):
        monkeypatch.setattr(tuning_module, name, lambda value=value: made.kept.append(value))
    monkeypatch.setattr(tuning_module, "_LOOK_S", 0.01)
    monkeypatch.setattr(tuning_module, "_IDLE_S", 0.3)
    made.worker = Living()
    made.add_worker(made.worker)
    yield made
    made.worker.status = Status.closing
    made.remove_worker(made.worker)
    until(lambda: not made._is_watched)


def until(holds, timeout=30):
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def found():
    return round(sys.getswitchinterval(), 6), *map(os.environ.get, NAMES)


def test_what_is_set_is_put_back_once_nothing_is_in_use(tuning, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    before = found()
    assert before[1:] == ("7", "true") and not tuning.kept
    with tuning.in_use(3):
        assert found() == (5e-4, "3", "true") and tuning.kept == [True]
        with tuning.in_use(2):  # by another
            assert os.environ["OMP_NUM_THREADS"] == "2"
        time.sleep(0.5)
        assert found()[0] == 5e-4
    with tuning.in_use(3):  # soon after
        assert tuning.kept == [True]
    until(lambda: found() == before)
    assert tuning.kept == [True, False]
    with tuning.in_use(3):
        assert tuning.kept == [True, False, True]
    until(lambda: found() == before)


def test_a_variable_is_never_deleted_nor_is_one_added_for_threads(tuning, monkeypatch):
    """A thread that iterates over ``os.environ`` would fail at one that is deleted meanwhile."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    with tuning.in_use(3):
        assert found() == (5e-4, None, "false")
    until(lambda: tuning.kept == [True, False])
    assert found()[1:] == (None, "false")


def test_what_is_put_back_does_not_undo_what_others_have_set_since(tuning, monkeypatch):
    before = sys.getswitchinterval()
    try:
        with tuning.in_use(3):
            sys.setswitchinterval(0.02)
            monkeypatch.setenv("OMP_NUM_THREADS", "11")
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
        until(lambda: tuning.kept == [True, False])
        assert found() == (0.02, "11", "true")
    finally:
        sys.setswitchinterval(before)


def test_threads_that_infer_are_sampled_less_often(tuning):
    """For the profile on the dashboard; an interval that a user has chosen stays."""
    others = [Living(20), Living(100), Living()]
    others[2].periodic_callbacks.clear()  # as if the profile were off
    for one in others:
        tuning.add_worker(one)
    with tuning.in_use(3):
        late = Living()
        tuning.add_worker(late)
        found = [one.sample_ms for one in (tuning.worker, *others[:2], late)]
        assert found == [100, 20, 100, 100]
        tuning.remove_worker(late)
        assert late.sample_ms == 10
        late.periodic_callbacks["profile"].callback_time = 50
        tuning.add_worker(late)
    until(lambda: tuning.kept == [True, False])
    found = [one.sample_ms for one in (tuning.worker, *others[:2], late)]
    assert found == [10, 20, 100, 50]
    for one in (*others, late):
        tuning.remove_worker(one)


def test_without_workers_all_is_put_back_as_soon_as_no_task_is_at_it(tuning, monkeypatch):
    monkeypatch.setattr(tuning_module, "_IDLE_S", 1000.0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    before = found()
    with tuning.in_use(3):
        pass
    assert found() != before
    tuning.remove_worker(tuning.worker)
    assert found() == before
    with tuning.in_use(3):
        assert found() != before
    until(lambda: found() == before)
    tuning.worker.status = Status.closed
    until(lambda: "pcm-tuning" not in {thread.name for thread in threading.enumerate()})


def load():
    return "live"


A = pcm.Context(load)


def use(i, ctx):
    with pcm.acquire(ctx) as live:
        return live


def sampled_ms(i, ctx):
    """Within the use of a context."""
    with pcm.acquire(ctx):
        return get_worker().periodic_callbacks["profile"].callback_time


def test_a_worker_of_dask_is_sampled_less_often(own_client):
    pcm.install(own_client)
    assert own_client.submit(sampled_ms, 1, A).result() == 100


def churn(i):
    """Arrays below the size that is mapped, 190 MiB of them, made and freed."""
    import numpy as np

    return len([np.ones(MIB // 8) for _ in range(190)])


def rss_bytes():
    return psutil.Process().memory_info().rss


def test_memory_that_plain_work_has_freed_goes_back(own_client):
    """The bar is what Dask's own trim leaves: 64 MiB more than before."""
    worker = next(iter(own_client.nthreads()))

    def rss():
        return own_client.run(rss_bytes, workers=[worker])[worker]

    def has_room(base):
        return rss() < base + 64 * MIB

    def is_as_before():
        return own_client.run(found, workers=[worker])[worker][:2] == first[worker][:2]

    def freed(n=4):
        own_client.gather(own_client.map(churn, range(n), workers=[worker], pure=False))

    first = own_client.run(found, workers=[worker])
    freed(1)  # what numpy needs
    base = rss()
    pcm.install(own_client)
    freed()
    until(lambda: has_room(base))
    assert own_client.run(found, workers=[worker]) == first
    assert own_client.submit(use, 0, A, workers=[worker]).result() == "live"
    freed()  # while memory is still kept
    until(is_as_before)
    until(lambda: has_room(base))  # ... and the context is idle
    freed()
    until(lambda: has_room(base))
    pcm.uninstall(own_client)
    freed()
    until(lambda: has_room(base))


@pytest.mark.usefixtures("spawned")
def test_plugins_cost_a_worker_without_frames_no_pandas(own_client):
    """All that is sent is defined here: this module imports more."""

    def heavy():
        return sorted({"pandas", "pyarrow", "torch", "transformers"} & sys.modules.keys())

    def build():
        return "built"

    def using(i, ctx):
        with pcm.acquire(ctx) as live:
            return live

    context = pcm.Context(build)
    assert list(own_client.run(heavy).values()) == [[], []]
    pcm.install(own_client)
    assert own_client.gather(own_client.map(using, range(4), ctx=context)) == ["built"] * 4
    assert list(own_client.run(heavy).values()) == [[], []]


def test_a_worker_that_is_to_use_the_cpu_loads_a_model_whatever_it_was_given(own_client):
    """Variables of batch systems name devices, and torch is one for CPUs."""

    def build():
        import torch  # noqa: F401

        from dask_pcm.ladder.device import chosen_device

        return chosen_device()

    def using(i, ctx):
        with pcm.acquire(ctx) as live:
            return live

    own_client.run(os.environ.update, {"ROCR_VISIBLE_DEVICES": "0", "GPU_DEVICE_ORDINAL": "0"})
    context = pcm.Context(build, device_memory=1000)
    with dask.config.set({"pcm.worker.accelerator": "cpu"}):
        pcm.install(own_client)
    assert own_client.submit(using, 0, context).result() == "cpu"

    def budgets(dask_scheduler):
        workers = dask_scheduler.plugins["pcm-gate"].state.workers
        return {view.device_bytes for view in workers.values()}

    assert own_client.run_on_scheduler(budgets) == {None}
