"""Which rows a step computes: questions beside batches, clients beside each other."""

from __future__ import annotations

import random

import pytest

from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.rows import Generated
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.engine.timeslice import Kind, Owner, TimeSlices
from tests.inference.engine.conftest import tiny
from tests.inference.engine.test_engine import ENDINGS, text

QUESTION, BATCH = Owner(Kind.QUESTION, "me"), Owner(Kind.BATCH, "me")
OTHER = Owner(Kind.BATCH, "another")


@pytest.fixture
def model(alone):
    return alone("llama")


def checked(driven, most_steps=5000):
    """Run to the end; the books are right at each step."""
    for _ in range(most_steps):
        if not driven.engine.n_rows:
            break
        driven.engine.step()
        driven.engine.schedule._held.validate()
    assert not driven.engine.n_rows
    while driven.engine.schedule.prefixes.drop_one():
        pass
    assert not driven.engine.paging.slabs.n_used
    assert driven.pool.n_free == driven.pool.n_pages
    return driven.found


def expected(model, prompts, n):
    """Tokens of rows that an engine computes undisturbed (``test_engine``: those of each alone)."""
    driven = model.engine(n_pages=400, budget_tokens=256)
    driven.generate_all(prompts, n)
    return driven.run()


def first_step(driven, key):
    """Steps until a row has its first token."""
    row = next(one for one in driven.engine.schedule._new if one.number == key)
    for step in range(1, 200):
        driven.engine.step()
        if len(row.tokens) > row.n_prompt:
            return step
    raise AssertionError("no token")


def test_a_question_begins_at_once_though_a_batch_has_all_memory(model):
    driven, rng = model.engine(n_pages=12, budget_tokens=64), random.Random(0)
    prompts = {k: text(rng, 20) for k in range(12)}
    driven.generate_all(prompts, 60, owner=BATCH)
    for _ in range(30):
        driven.engine.step()
    assert driven.pool.n_free < 2
    question = text(rng, 25)
    driven.generate("question", question, 10, owner=QUESTION, number=99)
    assert first_step(driven, 99) == 1
    n_left = sum(key in driven.found for key in prompts)
    while "question" not in driven.found:
        driven.engine.step()
    assert sum(key in driven.found for key in prompts) <= n_left + 2  # it did not wait for them
    assert driven.engine.paging.n_out or driven.engine.paging.n_recomputed
    found = checked(driven)
    assert found.pop("question") == expected(model, {"question": question}, 10)["question"]
    assert found == expected(model, prompts, 60)


def test_one_that_scores_does_not_delay_a_question(model):
    driven, rng = model.engine(n_pages=40, budget_tokens=64), random.Random(0)
    for key in range(200):
        driven.score(key, text(rng, 30), ENDINGS)
    for _ in range(3):
        driven.engine.step()
    driven.generate("question", text(rng, 20), 5, owner=QUESTION, number=99)
    assert first_step(driven, 99) == 1
    checked(driven)


def test_a_burst_of_questions_delays_a_batch_and_does_not_stop_it(model):
    driven, rng = model.engine(n_pages=20, budget_tokens=32), random.Random(0)
    batch = text(rng, 20)
    driven.generate("batch", batch, 30, owner=BATCH)
    asked = 0
    while "batch" not in driven.found:
        while driven.engine.schedule.n_rows < 12:  # more come for as long as it runs
            driven.generate(f"question {asked}", text(rng, 20), 10, owner=QUESTION)
            asked += 1
        driven.engine.step()
    assert driven.found["batch"] == expected(model, {"batch": batch}, 30)["batch"]
    assert driven.engine.n_steps > 100  # questions had more


def test_batches_of_two_clients_share_the_memory(model):
    driven, rng = model.engine(n_pages=20, budget_tokens=64), random.Random(0)
    prompts = {k: text(rng, 20) for k in range(16)}
    driven.generate_all(prompts, 50, owner=BATCH)
    for _ in range(20):
        driven.engine.step()
    late = {f"late {k}": text(rng, 20) for k in range(16)}
    for key, prompt in late.items():
        driven.generate(key, prompt, 50, owner=OTHER)
    for _ in range(60):
        driven.engine.step()
    slices = driven.engine.schedule._slices
    assert abs(slices.served(BATCH) - slices.served(OTHER)) < 150
    found = checked(driven)
    assert found == expected(model, {**prompts, **late}, 50)


def test_rows_of_a_prefix_go_and_come_back_and_it_is_computed_once(model):
    driven, rng = model.engine(n_pages=16, budget_tokens=64), random.Random(0)
    driven.engine.paging._may_recompute = False
    shared = text(rng, 40)
    prompts = {k: [*shared, *text(rng, 9)] for k in range(6)}
    driven.generate_all(prompts, 40, owner=BATCH)
    for _ in range(12):
        driven.engine.step()
    question = text(rng, 150)
    driven.generate("question", question, 60, owner=QUESTION)
    found = checked(driven)
    assert found.pop("question") == expected(model, {"question": question}, 60)["question"]
    assert found == expected(model, prompts, 40)
    assert driven.engine.paging.n_out and not driven.engine.paging.n_recomputed
    n_prompts = 40 + 6 * 9 + 150
    assert driven.engine.n_tokens == n_prompts + 6 * 39 + 59  # nothing twice


def test_questions_that_share_a_prefix_begin_at_once_too(model):
    driven, rng = model.engine(n_pages=14, budget_tokens=64), random.Random(0)
    prompts = {k: text(rng, 20) for k in range(12)}
    driven.generate_all(prompts, 60, owner=BATCH)
    for _ in range(30):
        driven.engine.step()
    assert driven.pool.n_free < 2
    outer, inner = text(rng, 36), text(rng, 40)  # of all of them, and of two
    asked = {f"question {k}": [*outer, *(inner if k < 2 else []), *text(rng, 5)] for k in range(4)}
    for number, (key, prompt) in enumerate(asked.items()):
        driven.generate(key, prompt, 8, owner=QUESTION, number=100 + number)
    assert first_step(driven, 103) <= 3
    found = checked(driven)
    assert {key: found.pop(key) for key in asked} == expected(model, asked, 8)
    assert found == expected(model, prompts, 60)


def test_what_made_room_goes_on_before_what_has_not_begun(model):
    driven, rng = model.engine(n_pages=12, budget_tokens=64), random.Random(0)
    driven.engine.paging._may_recompute = False
    for key in range(6):
        driven.generate(key, text(rng, 20), 60, owner=BATCH)
    for _ in range(20):
        driven.engine.step()
    driven.generate("question", text(rng, 60), 2, owner=QUESTION)
    driven.engine.step()
    away = [row for row in driven.engine.schedule._all_waiting() if row.is_parked]
    assert away
    for key in range(10, 20):  # longer ones come
        driven.generate(key, text(rng, 20), 90, owner=BATCH)
    driven.engine.step()
    waiting = driven.engine.schedule._waiting[BATCH]
    assert all(row.is_parked for row in waiting[: sum(row.is_parked for row in waiting)])
    checked(driven)


def test_a_row_that_is_dropped_while_it_is_away_leaves_nothing(model):
    driven, rng = model.engine(n_pages=12, budget_tokens=64), random.Random(0)
    driven.engine.paging._may_recompute = False
    for key in range(8):
        driven.generate(key, text(rng, 20), 80, owner=BATCH)
    for _ in range(20):
        driven.engine.step()
    driven.generate("question", text(rng, 60), 60, owner=QUESTION)
    for _ in range(3):
        driven.engine.step()
    waiting = driven.engine.schedule._all_waiting()
    away = [row for row in waiting if row.is_parked]
    assert away and driven.engine.paging.slabs.n_used
    driven.engine.drop(away)
    driven.engine.drop(away)  # once more changes nothing
    driven.engine.schedule._held.validate()
    checked(driven)


def test_a_question_larger_than_the_device_fails_and_the_rest_goes_on(model):
    driven, rng = model.engine(n_pages=6, budget_tokens=64, most_bytes=0), random.Random(0)
    prompts = {k: text(rng, 20) for k in range(5)}
    driven.generate_all(prompts, 40, owner=BATCH)
    driven.generate("question", text(rng, 120), 10, owner=QUESTION)
    found = checked(driven)
    assert "more than 120 tokens" in str(found.pop("question"))
    assert found == expected(model, prompts, 40)


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_changes_a_token(model, seed):
    rng = random.Random(seed)
    shared = text(rng, rng.choice([0, 0, 40]))
    prompts = {k: [*shared, *text(rng, rng.randint(1, 70))] for k in range(rng.randint(5, 12))}
    lengths = {key: rng.randint(1, 40) for key in prompts}
    need = max(-(-(len(prompts[key]) + n) // 16) for key, n in lengths.items())
    driven = model.engine(rng.randint(need, 2 * need), rng.choice([16, 64]))
    memory = rng.choice([{}, {"most_bytes": 0}, {"may_recompute": False}])
    driven.engine = type(driven.engine)(
        model.model,
        driven.pool,
        driven.engine.capacity,
        tiny.N_TOKENS,
        paging=Paging(driven.pool, **memory),
        slices=TimeSlices(rng.choice([1, 4, 16])),
    )
    todo = list(prompts)
    while todo or driven.engine.n_rows:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if todo:
                key = todo.pop()
                owner = Owner(rng.choice([*Kind]), rng.choice("ab"))
                driven.generate(key, prompts[key], lengths[key], owner=owner)
        driven.engine.step()
        driven.engine.schedule._held.validate()
    assert checked(driven) == expected(model, prompts, lengths)


def test_new_tokens_are_told_as_they_come(model):
    driven, told = model.engine(), []
    prompt = text(random.Random(0), 9)
    driven.generate("row", prompt, 7, on_token=told.append, sampling=Sampling())
    driven.engine.step()
    assert told == model.continued(prompt, 1)
    driven.run()
    assert told == driven.found["row"]


def test_a_row_is_forgotten_once(model):
    driven = model.engine()
    row = Generated([1, 2, 3], n_prompt=3, n_max=1, owner=QUESTION)
    driven.engine.add([row])
    driven.engine.step()
    driven.engine.drop([row])
    driven.engine.schedule._held.validate()
    assert not driven.engine.schedule._slices._clients[Kind.QUESTION]._n_open


def test_a_row_that_fails_leaves_an_engine_that_goes_on(model):
    driven, rng = model.engine(n_pages=4, most_bytes=0), random.Random(0)
    driven.generate("question", text(rng, 80), 3, owner=QUESTION)
    while "question" not in driven.found:
        driven.engine.step()
    assert "more than 80 tokens" in str(driven.found.pop("question"))
    prompt = text(rng, 9)
    driven.generate("batch", prompt, 4, owner=BATCH)
    assert checked(driven) == expected(model, {"batch": prompt}, 4)


def test_rows_that_fit_alone_do_without_a_prefix_that_leaves_no_room(model):
    driven, rng = model.engine(n_pages=4, budget_tokens=64), random.Random(0)
    shared = text(rng, 40)
    prompts = {k: [*shared, 5 + k] for k in range(3)}
    driven.generate_all(prompts, 23, owner=BATCH)
    assert checked(driven) == expected(model, prompts, 23)


def test_a_long_row_that_is_scored_and_one_that_is_continued_both_have_room_in_turn(model):
    driven, rng = model.engine(n_pages=10, budget_tokens=32), random.Random(0)
    prompt, scored = text(rng, 40), text(rng, 140)
    driven.generate("continued", prompt, 100, owner=BATCH)
    driven.score("scored", scored, ENDINGS)
    found = checked(driven)
    assert found["scored"] == pytest.approx(model.scores(scored, ENDINGS), abs=1e-4)
    assert found["continued"] == expected(model, {"continued": prompt}, 100)["continued"]


def test_without_room_off_the_device_questions_do_not_undo_each_other_for_ever(model):
    driven, rng = model.engine(n_pages=8, budget_tokens=32), random.Random(0)
    driven.engine.paging.slabs.close()
    driven.engine.schedule._slices.slice_tokens = 1
    asked = {k: text(rng, 60) for k in range(8)}
    for key, prompt in asked.items():
        driven.generate(key, prompt, 20, owner=QUESTION)
    assert checked(driven) == expected(model, asked, 20)
