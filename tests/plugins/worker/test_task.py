"""A Context handed to plain Dask: where the gate sees it, and where it does not."""

from __future__ import annotations

import asyncio
import functools
import time
import warnings

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, Event, Lock, wait

import dask_pcm as pcm
from dask_pcm.errors import DeadlockError, LoadError, RecipeError
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.plugins.worker.task import client_of_task, n_losses, settings, was_lost
from tests.support.patience import patient, until


def load(name="live"):
    return [name]


def use(x, model=None):
    with pcm.acquire(model) as live:
        return f"{x} {live[0]}"


class Holder:
    """A callable object that carries its context where no walk looks."""

    def __init__(self, context):
        self.context = context

    def __call__(self, x):
        return use(x, self.context)


@pytest.fixture
def seen(client, shared_cluster):
    """Run something; return its value, whether the gate saw the tasks, and what was warned of."""

    def run(make):
        context = pcm.Context(load, f"live {time.monotonic_ns()}")  # cold everywhere
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = make(context)
            client.run(lambda: None)
            deadline = time.monotonic() + 2
            while not caught and not _wanted(client, context) and time.monotonic() < deadline:
                time.sleep(0.02)
        texts = [str(w.message) for w in caught if "middle of a task" in str(w.message)]
        return value, _wanted(client, context), texts

    return run


def _wanted(client, context):
    def wanted(dask_worker):
        return context.digest in dask_worker.plugins[CONTEXTS].contexts.wanted

    return any(client.run(wanted).values())


FRAME = pd.DataFrame({"x": range(4)})


def on_frame(frame, model=None):
    with pcm.acquire(model) as live:
        return frame.assign(v=live[0])


def on_block(block, model=None):
    with pcm.acquire(model) as live:
        return block + len(live)


FRAME_META = {"x": "i8", "v": "str"}
SEEN = {
    "submit": lambda c, ctx: c.submit(use, 1, model=ctx).result(),
    "submit, by place": lambda c, ctx: c.submit(use, 1, ctx).result(),
    "map": lambda c, ctx: c.gather(c.map(use, range(3), model=ctx)),
    "partial": lambda c, ctx: c.submit(functools.partial(use, model=ctx), 1).result(),
    "in a list in a dict": lambda c, ctx: c.submit(
        lambda d: use(1, d["m"][0]), {"m": [ctx]}
    ).result(),
    "delayed": lambda c, ctx: dask.delayed(use)(1, model=ctx).compute(),
    "delayed twice": lambda c, ctx: dask.delayed(use)(1, dask.delayed(ctx)).compute(),
    "map_partitions": lambda c, ctx: (
        dd.from_pandas(FRAME, npartitions=2)
        .map_partitions(on_frame, model=ctx, meta=FRAME_META)
        .compute()
    ),
    "map_partitions, optimised and persisted": lambda c, ctx: (
        dd.from_pandas(FRAME, npartitions=2)
        .map_partitions(on_frame, ctx, meta=FRAME_META)
        .optimize()
        .persist()
        .compute()
    ),
    "map_blocks": lambda c, ctx: (
        da.ones(4, chunks=2).map_blocks(on_block, model=ctx, dtype="f8").compute().tolist()
    ),
    "bag.map": lambda c, ctx: db.from_sequence([1, 2], npartitions=2).map(use, model=ctx).compute(),
}
UNSEEN = {
    "closure": lambda c, ctx: c.submit(lambda x: use(x, ctx), 1).result(),
    "callable object": lambda c, ctx: c.submit(Holder(ctx), 1).result(),
    "scattered": lambda c, ctx: c.submit(use, 1, c.scatter(ctx)).result(),
    "very long list": lambda c, ctx: c.submit(
        lambda many: use(1, many[0]), [ctx, *range(100_000)]
    ).result(),
}


@pytest.mark.parametrize("api", SEEN)
def test_what_the_gate_sees(client, seen, api):
    value, is_wanted, warned = seen(lambda ctx: SEEN[api](client, ctx))
    assert is_wanted and not warned
    assert "live" in str(value) or np.asarray(value).tolist() == [2.0] * 4


@pytest.mark.parametrize("api", UNSEEN)
def test_what_it_does_not_see_works_and_says_how_to_be_seen(client, seen, api):
    value, is_wanted, warned = seen(lambda ctx: UNSEEN[api](client, ctx))
    assert "live" in str(value)
    assert not is_wanted
    (text,) = warned
    assert "'load' is loaded in the middle of a task" in text and "as an argument" in text


def test_a_hidden_context_is_kept_and_warned_of_once_a_worker(client, tmp_path):
    log = tmp_path / "log"

    def noted(path):
        with open(path, "a") as file:
            file.write("load\n")
        return path

    context = pcm.Context(noted, str(log))

    def hidden(i):
        with pcm.acquire(context) as live:
            return live

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client.gather(client.map(hidden, range(20)))
        client.run(lambda: None)
    n_loads = len(log.read_text().splitlines())
    assert 1 <= n_loads <= 2
    assert 1 <= sum("middle of a task" in str(w.message) for w in caught) <= 2


def test_a_hidden_context_that_fails_is_tried_again(client, tmp_path):
    path = tmp_path / "weights"

    def read(path):
        return open(path).read()

    context = pcm.Context(read, str(path))

    def hidden(i):
        with pcm.acquire(context) as live:
            return live

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed = client.submit(hidden, 1)
        with pytest.raises(LoadError, match="FileNotFoundError"):
            failed.result()
        path.write_text("weights")

        def answers():
            tried = client.map(hidden, range(2, 8), pure=False)
            wait(tried)
            return [one.result() for one in tried if one.status == "finished"]

        until(lambda: answers() == ["weights"] * 6)  # its back-off is ten times what it took


def test_a_hidden_context_that_fails_after_long_is_not_tried_by_every_task(client, tmp_path):
    log = tmp_path / "log"

    def failing(path):
        with open(path, "a") as file:
            file.write("load\n")
        time.sleep(1)
        raise RuntimeError("no weights")

    context = pcm.Context(failing, str(log))

    def hidden(i):
        with pcm.acquire(context) as live:
            return live

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        futures = client.map(hidden, range(20))
        wait(futures)
    errors = [future.exception() for future in futures]
    assert all(isinstance(error, LoadError) and "no weights" in str(error) for error in errors)
    assert "without another attempt" in errors[0].__notes__[0]
    assert len(log.read_text().splitlines()) <= 2  # one a worker


def test_once_it_is_mended_a_task_that_is_seen_has_it_loaded(client, tmp_path):
    """However often tasks with a hidden context have failed before."""
    path = tmp_path / "weights"

    def read(path):
        return open(path).read()

    context = pcm.Context(read, str(path))

    def hidden(i):
        with pcm.acquire(context) as live:
            return live

    def seen(i, model):
        with pcm.acquire(model) as live:
            return live

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(8):
            future = client.submit(hidden, i)
            wait(future)
            assert future.status == "error"
            time.sleep(0.05)
    path.write_text("weights")
    assert client.gather(client.map(seen, range(8), model=context)) == ["weights"] * 8


def test_a_loader_that_acquires_another_context(client, tmp_path):
    """In the store of its worker: each is built once there, whoever asks."""
    log = tmp_path / "log"

    def base(path):
        with open(path, "a") as file:
            file.write("base\n")
        return "base"

    lower = pcm.Context(base, str(log))

    def upper(context):
        with pcm.acquire(context) as live:
            return live + " upper"

    higher = pcm.Context(upper, lower)

    def both(i, models):
        with pcm.acquire(*models) as (low, high):
            return low, high

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = client.gather(client.map(both, range(8), models=[lower, higher]))
    assert found == [("base", "base upper")] * 8
    assert len(log.read_text().splitlines()) <= 2  # one a worker


def test_tasks_that_wait_for_each_others_contexts_are_told(client):
    a, b = pcm.Context(load, "one"), pcm.Context(load, "other")

    def taking(names, model):
        first, second = (a, b) if names == "ab" else (b, a)
        with pcm.acquire(first):
            if not Lock("only-one").acquire(timeout=0):  # the second to be here
                Event("both-hold").set()
            Event("both-hold").wait(patient(10))
            with pcm.acquire(second):
                return names

    worker = next(iter(client.scheduler_info()["workers"]))
    futures = [client.submit(taking, names, [a, b], workers=[worker]) for names in ("ab", "ba")]
    wait(futures, timeout=patient(30))
    errors = [future.exception() for future in futures]
    assert sum(isinstance(error, DeadlockError) for error in errors) == 1
    assert sum(error is None for error in errors) == 1


def test_several_at_once_and_outside_a_cluster():
    a, b = pcm.Context(load, "a"), pcm.Context(load, "b")
    with pcm.acquire(a, b) as (first, second):
        assert (first, second) == (["a"], ["b"])
    with pcm.acquire(a) as again:
        assert again is first
    with pytest.raises(RecipeError, match=r"acquire takes a dask_pcm\.Context; found \['a'\]"):
        pcm.acquire(first).__enter__()


def test_the_same_task_may_take_it_again(client):
    def nested(i, model=None):
        with pcm.acquire(model) as outer, pcm.acquire(model) as inner:
            return outer is inner

    assert client.gather(client.map(nested, range(4), model=pcm.Context(load, "n"))) == [True] * 4


def test_a_coroutine_is_told_that_it_would_hold_up_the_loop(client):
    async def awaiting(i, model=None):
        with pcm.acquire(model):
            return i

    with pytest.raises(RecipeError, match="def instead of async def"):
        client.submit(awaiting, 1, model=pcm.Context(load, "c")).result(timeout=patient(20))


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_long_list_beside_a_context_does_not_hide_it(client, seen, place):
    def beside(*args):
        model = args[0] if isinstance(args[0], pcm.Context) else args[1]
        return use(1, model)

    def make(ctx):
        args = (ctx, list(range(5_000)))
        return client.submit(beside, *(args if place == "before" else args[::-1])).result()

    _, is_wanted, warned = seen(make)
    assert is_wanted and not warned


def test_in_a_notebook_whose_cells_run_in_a_loop():
    async def cell():
        with pcm.acquire(pcm.Context(load, "cell")) as live:
            return live

    assert asyncio.run(cell()) == ["cell"]


def losses(_):
    return was_lost(), n_losses()


def test_how_many_processes_a_task_has_cost_the_scheduler_is_asked(
    client, shared_cluster, monkeypatch
):
    handlers, asked = shared_cluster.scheduler.handlers, []

    async def told(key):
        asked.append(key)
        return 2

    def lost():
        with dask.annotate(pcm_lost=1):
            return client.submit(losses, 0, pure=False)

    monkeypatch.setitem(handlers, "pcm_losses", told)
    assert client.submit(losses, 0, pure=False).result(30) == (False, 0)
    assert not asked  # where nothing was lost there is nothing to ask
    task = lost()
    assert task.result(30) == (True, 2)
    assert asked == [task.key]
    monkeypatch.delitem(handlers, "pcm_losses")
    assert lost().result(30) == (True, 0)  # a scheduler without the gate
    assert losses(0) == (False, 0)  # in no worker


def whose(x, model=None):
    with pcm.acquire(model):
        return client_of_task(), settings().slice_tokens


def test_a_task_knows_whose_it_is_and_the_settings_of_its_gate(client, shared_cluster):
    context = pcm.Context(load, "whose")
    with Client(shared_cluster, set_as_default=False) as other:
        mine = client.submit(whose, 1, model=context).result(patient(30))
        theirs = other.submit(whose, 2, model=context).result(patient(30))
    assert mine == (client.id, 16) and theirs == (other.id, 16)
    assert client.submit(lambda: client_of_task()).result(patient(30)) == ""  # not of the gate
    assert client_of_task() == "" and settings().slice_tokens == 16
