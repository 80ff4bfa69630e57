"""Rows of many tasks by one engine on a thread of its own."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from dask_pcm.inference.engine.rows import Generated, RowError, Scored, trie_of
from dask_pcm.inference.engine.serving import EngineClosedError, Serving
from dask_pcm.inference.engine.timeslice import Kind, Owner
from dask_pcm.ladder.store import Store
from tests.inference.engine.test_engine import ENDINGS, text
from tests.support.patience import patient, until


@pytest.fixture
def model(alone):
    return alone("llama")


@pytest.fixture
def serving(model):
    made = []

    def make():
        made.append(model.engine().engine)
        return made[-1]

    one = Serving(make, n_bytes=0, n_rows=30)
    one.start()
    one.made = made
    yield one
    one.close()


def scored(tokens):
    return Scored(list(tokens), lambda _: None, trie=trie_of(ENDINGS))


def endless(tokens):
    return Generated(list(tokens), lambda _: None, n_prompt=len(tokens), n_max=2000)


def test_requests_of_many_threads_have_their_own_results_in_their_order(serving, model):
    rng = random.Random(0)
    requests = [[text(rng, rng.randint(1, 40)) for _ in range(7)] for _ in range(12)]
    with ThreadPoolExecutor(4) as threads:
        submit = lambda rows: serving.submit([scored(row) for row in rows]).result()  # noqa: E731
        found = list(threads.map(submit, requests))
    serving.close()  # the model is the test's own again
    for rows, scores in zip(requests, found, strict=True):
        for row, score in zip(rows, scores, strict=True):
            assert score == pytest.approx(model.scores(row, ENDINGS), abs=1e-4)
    assert serving.submit([]).result() == []


def test_it_says_how_many_rows_it_wants_and_lets_no_more_wait(serving):
    assert serving.hungry() == 30
    rng = random.Random(1)
    first = serving.submit([endless(text(rng, 5)) for _ in range(29)])
    assert serving.hungry() == 1
    second = serving.submit([endless(text(rng, 5)) for _ in range(4)])
    assert serving.hungry() == 0
    begun = threading.Event()

    def third():
        begun.set()
        with pytest.raises(EngineClosedError):
            serving.submit([scored([1, 2])])
        begun.clear()

    thread = threading.Thread(target=third)
    thread.start()
    assert begun.wait(patient(10))
    time.sleep(0.2)
    assert begun.is_set()  # it waits for room
    serving.close()
    thread.join(patient(10))
    assert not begun.is_set()
    for future in (first, second):
        with pytest.raises(EngineClosedError):
            future.result(patient(10))


def test_a_suspect_has_the_engine_alone(serving):
    rng = random.Random(2)
    others = serving.submit([scored(text(rng, 30)) for _ in range(20)])
    late = []
    with serving.alone():
        assert others.done()
        thread = threading.Thread(
            target=lambda: late.append(serving.submit([scored([5, 6, 7])]).result())
        )
        thread.start()
        assert serving.submit([scored(text(rng, 9))]).result(patient(10))
        assert not late
    thread.join(patient(10))
    assert len(late) == 1


def test_a_question_that_comes_while_a_suspect_waits_for_the_engine_keeps_no_one(serving):
    rng = random.Random(6)
    serving.submit([Generated(text(rng, 5), lambda _: None, n_prompt=5, n_max=300)])
    entered, may_leave = threading.Event(), threading.Event()

    def alone():
        with serving.alone():
            entered.set()
            assert may_leave.wait(patient(20))

    thread = threading.Thread(target=alone)
    thread.start()
    until(lambda: serving._alone is not None, patient(20))
    question = serving.ask(Generated(text(rng, 5), lambda _: None, n_prompt=5, n_max=3))
    assert entered.wait(patient(20)) and not question.done()
    may_leave.set()
    assert len(question.result(patient(20))[0]) <= 3
    thread.join(patient(20))


def test_it_drains(serving):
    future = serving.submit([scored([1, 2, 3])])
    serving.drain()
    assert future.done()
    with pytest.raises(EngineClosedError):
        serving.submit([scored([1, 2, 3])])


def broken(engine, raises, error):
    """Have forwards fail, of which `raises` says so by their token ids."""
    logits = engine._forward.logits

    def failing(pack, kept):
        if raises(pack.ids[0].tolist()):
            raise error
        return logits(pack, kept)

    engine._forward.logits = failing


def test_a_row_that_fails_does_so_alone(serving, model):
    rng = random.Random(3)
    rows = [text(rng, 20) for _ in range(9)]
    rows[4][7] = 599
    broken(serving.made[0], lambda ids: 599 in ids, ValueError("no such token"))
    found = serving.submit([scored(row) for row in rows]).result(patient(30))
    serving.close()
    assert isinstance(found[4], RowError) and str(found[4]) == "ValueError: no such token"
    for k, row in enumerate(rows):
        if k != 4:
            assert found[k] == pytest.approx(model.scores(row, ENDINGS), abs=1e-4)


def test_a_step_that_fails_as_a_whole_and_not_in_parts_is_said_once(serving, model, caplog):
    rng = random.Random(5)
    rows = [text(rng, 9) for _ in range(20)]
    broken(serving.made[0], lambda ids: len(ids) > 20, ValueError("some fault of ours"))
    found = serving.submit([scored(row) for row in rows]).result(patient(30))
    serving.close()
    for row, scores in zip(rows, found, strict=True):
        assert scores == pytest.approx(model.scores(row, ENDINGS), abs=1e-4)
    said = [one.message for one in caplog.records if "some fault of ours" in one.message]
    assert len(said) == 1 and "smaller steps" in said[0] and serving.made[0].n_failed > 1


def test_a_prefix_that_fails_is_done_without(serving, model):
    rng = random.Random(4)
    shared = text(rng, 60)
    rows = [[*shared, *text(rng, 5)] for _ in range(6)]
    broken(serving.made[0], lambda ids: ids == shared, ValueError("as a prefix only"))
    found = serving.submit([scored(row) for row in rows]).result(patient(30))
    serving.close()
    for row, scores in zip(rows, found, strict=True):
        assert scores == pytest.approx(model.scores(row, ENDINGS), abs=1e-4)


def test_without_memory_steps_become_smaller_and_no_row_is_lost(serving):
    rng = random.Random(5)
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")
    broken(serving.made[0], lambda ids: len(ids) > 40, full)
    found = serving.submit([scored(text(rng, 20)) for _ in range(25)]).result(patient(30))
    assert all(isinstance(scores, list) for scores in found)
    assert serving.made[0].capacity.tokens <= 40


def test_a_lost_device_ends_all_requests_with_its_error(serving):
    lost = RuntimeError("CUDA error: device-side assert triggered")
    broken(serving.made[0], lambda ids: True, lost)
    future = serving.submit([scored([1, 2, 3])])
    with pytest.raises(RuntimeError, match="device-side assert"):
        future.result(patient(30))
    until(lambda: not serving._thread.is_alive())
    with pytest.raises(EngineClosedError):
        serving.submit([scored([1, 2, 3])])


def test_what_is_not_finished_has_drafts_and_goes_on_from_them(serving, model):
    prompt = text(random.Random(8), 12)
    made = lambda n: Generated(list(prompt), lambda _: None, n_prompt=12, n_max=n, key=3)  # noqa: E731
    serving.submit([made(2000)])
    until(lambda: len(serving.drafts().get(3, [])) > 5)
    with ThreadPoolExecutor(1) as other:  # drafts are those of a thread's own requests
        assert other.submit(serving.drafts).result() == {}
    draft = serving.drafts()[3]
    serving.close()

    again = Serving(lambda: model.engine().engine, n_bytes=0, n_rows=30)
    again.start()
    try:
        again.resume({3: draft, 4: [9, 9]})
        n = len(draft) + 4
        (found,) = again.submit([made(n)]).result(patient(30))
        (shorter,) = again.submit([made(2)]).result(patient(30))
        again.resume({3: draft})
        (cut,) = again.submit([made(3)]).result(patient(30))
    finally:
        again.close()
    expected = model.continued(prompt, n)
    assert found == expected and found[: len(draft)] == draft[:n]
    assert shorter == expected[:2] and cut == expected[:3]
    assert again.drafts() == {}


def test_a_thread_that_has_waited_for_room_is_accepted_at_once(serving):
    rng = random.Random(9)
    assert serving.wait_for_room(0)
    serving.submit([endless(text(rng, 5)) for _ in range(30)])
    assert not serving.wait_for_room(0.01)
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(serving.wait_for_room, 0.01).result()
    full = Serving(lambda: serving.made[0], n_bytes=0, n_rows=1)
    full._is_open = True
    assert full.wait_for_room(0)
    with ThreadPoolExecutor(1) as other:
        other.submit(full.submit, [scored([1, 2])]).result(patient(10))
    full.submit([scored([1, 2])])  # although another has taken the room meanwhile
    assert full.hungry() == 0 and not full.wait_for_room(0)


def test_rows_that_have_ended_are_drafts_until_their_request_has(serving, model):
    rng = random.Random(10)
    short = Generated(text(rng, 5), lambda _: None, n_prompt=5, n_max=3, key=1)
    long = Generated(text(rng, 5), lambda _: None, n_prompt=5, n_max=2000, key=2)
    serving.submit([short, long])
    until(lambda: len(serving.drafts().get(2, [])) > 8)
    assert len(serving.drafts()[1]) == 3
    other = serving.submit([Generated(text(rng, 5), lambda _: None, n_prompt=5, n_max=2, key=4)])
    assert other.result(patient(30)) and 4 not in serving.drafts()


@pytest.mark.parametrize("n_kept", range(8))
def test_a_text_that_goes_on_ends_where_it_would_have(serving, n_kept):
    prompt = text(random.Random(11), 12)
    plain = Generated(list(prompt), lambda _: None, n_prompt=12, n_max=7)
    whole = serving.submit([plain]).result(patient(30))[0]
    is_over = lambda tokens: whole[4] in tokens  # noqa: E731

    def ask():
        row = Generated(list(prompt), lambda _: None, n_prompt=12, n_max=20, is_over=is_over, key=5)
        return serving.submit([row]).result(patient(30))[0]

    expected = ask()
    serving.resume({5: whole[:n_kept]})
    assert ask() == expected
    serving.resume({})
    assert serving._drafts == {}


def test_rows_of_a_cancelled_request_are_computed_no_further(serving, model):
    """Whatever they are doing: waiting, in pages, or in the step that runs."""
    engine = serving.made[0]
    begun = [serving.submit([endless([1, 2, k]), scored([3, k])]) for k in range(8)]
    until(lambda: all(row.tokens[3:] for row in engine.schedule._held.running), patient(20))
    kept = serving.submit([scored([4, 5, 6])])
    assert all(one.cancel() for one in begun[:7])
    until(lambda: engine.n_rows == 1, patient(20))
    assert kept.result(patient(20)) and serving.hungry() == 29  # one has been scored
    assert begun[7].cancel() and not any(one.cancel() for one in [kept])
    until(lambda: engine.n_rows == 0, patient(20))
    assert serving.hungry() == 30
    assert serving.submit([scored([7])]).result(patient(20))
    engine._pool.validate()
    while engine.schedule.prefixes.drop_one():
        pass
    assert engine._pool.n_free == engine._pool.n_pages


def test_a_thread_that_is_interrupted_while_it_waits_to_be_alone_gives_its_turn_back(serving):
    running = serving.submit([endless([1, 2])])
    waits = threading.Event()

    def interrupted():
        with pytest.raises(TimeoutError), serving.alone():
            raise AssertionError("it is not alone")

    real = serving._changed.wait_for

    def wait_for(is_true, timeout=None):
        if serving._alone is None or threading.current_thread() is not thread:
            return real(is_true, timeout)
        waits.set()
        raise TimeoutError

    serving._changed.wait_for = wait_for
    thread = threading.Thread(target=interrupted)
    thread.start()
    assert waits.wait(patient(10))
    thread.join(patient(10))
    running.cancel()
    assert serving.submit([scored([1, 2, 3])]).result(patient(20))


def test_a_thread_is_alone_only_once_the_step_of_a_cancelled_request_has_ended(serving):
    inside, go, entered = threading.Event(), threading.Event(), threading.Event()
    engine = serving.made[0]
    run = engine._run

    def slow(parts):
        inside.set()
        assert go.wait(patient(20))
        run(parts)

    engine._run = slow
    future = serving.submit([scored([1, 2, 3])])
    assert inside.wait(patient(10)) and future.cancel()

    def enter():
        with serving.alone():
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    until(lambda: serving._alone is not None, patient(10))
    assert not entered.wait(0.3)
    go.set()
    assert entered.wait(patient(10))
    thread.join(patient(10))


@pytest.mark.parametrize("rows", ["none", "ended", "scored", "continued", "failed"])
def test_a_closed_engine_leaves_nothing_on_the_device(model, rows):
    """Its pages are free at once, not when Python's collector finds them."""
    pools, rng = [], random.Random(6)

    def make():
        engine = model.engine().engine
        pools.append(weakref.ref(engine._pool))
        return engine

    serving = Serving(make, n_bytes=0, n_rows=30)
    gc.collect()
    gc.disable()
    try:
        serving.start()
        left = None
        if rows == "ended":
            serving.submit([scored([1, 2, 3])]).result(patient(20))
        elif rows == "scored":  # some are computed, and not told
            left = serving.submit([scored(text(rng, 60)) for _ in range(400)])
            until(lambda: serving.hungry() > 30 - 400, patient(20))
        elif rows == "continued":
            left = serving.submit([endless([1, 2]), scored([3])])
        elif rows == "failed":
            model.model.forward = lambda **_: broken_device()
            left = serving.submit([scored([1, 2, 3])])
            assert "device-side" in str(left.exception(patient(20)))
        serving.close()
        made, kept = weakref.ref(serving._thread), pools[0]()
        assert kept is None and not made().is_alive()
    finally:
        gc.enable()
    assert left is None or isinstance(left.exception(), (EngineClosedError, RuntimeError))


def broken_device():
    raise RuntimeError("CUDA error: device-side assert triggered")


def test_memory_that_is_lent_changes_no_token_and_is_back_within_a_step(model):
    """A lender in this process, over the sockets that workers have."""
    lender = Store(budget=lambda: 1 << 20, is_mapped=False)
    lender.lend(lambda: "cpu").open("engines", "lender")
    borrower = Store(budget=lambda: 0, is_mapped=False)
    lending = borrower.lend(devices=lambda: {"cpu": "cpu"})
    lending.open("engines", "borrower")
    rng = random.Random(0)
    prompts = [text(rng, rng.randint(20, 60)) for _ in range(12)]
    made = []

    def make():
        engine = model.engine(n_pages=12).engine
        engine.paging._may_recompute = False
        # All that is sent goes to what is lent.
        engine.paging.slabs.most_pages = 0
        made.append(engine)
        return engine

    one = Serving(make, n_bytes=0, n_rows=30)
    one.lend(lending.borrow)
    one.start()
    futures = [one.ask(asked(prompt)) for prompt in prompts]
    n_reclaimed = 0
    while not all(future.done() for future in futures):
        if lender.lending.leases.lent_bytes():
            n_reclaimed += lender.lending.leases.reclaim()
        time.sleep(0.002)
    assert n_reclaimed and made[0].paging.slabs.n_lent
    assert until(lambda: not lender.lending.leases.lent_bytes())
    one.close()
    assert [future.result() for future in futures] == [
        [model.continued(prompt, 40)] for prompt in prompts
    ]
    for store in (lender, borrower):
        store.validate()
        store.close()


def asked(prompt):
    owner = Owner(Kind.QUESTION, "me")
    return Generated(list(prompt), lambda _: None, n_prompt=len(prompt), n_max=40, owner=owner)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of luck"), ValueError("a fault")])
def test_an_engine_that_stops_by_an_error_says_so_and_one_that_is_closed_does_not(
    serving, monkeypatch, error
):
    stopped = threading.Event()
    serving.on_stopped(stopped.set)

    def step():
        raise error

    monkeypatch.setattr(serving.made[0], "step", step)
    future = serving.ask(asked([1, 2, 3]))
    with pytest.raises(type(error), match=str(error)):
        future.result(20)
    assert stopped.wait(20)
    with pytest.raises(EngineClosedError):
        serving.ask(asked([1, 2, 3]))
    stopped.clear()
    serving.close()
    assert not stopped.is_set()
