"""Rows whose keys and values take more than the device has say what they say with room for all."""

from __future__ import annotations

import random

import pytest
import torch

from dask_pcm.inference.engine import long_context
from dask_pcm.inference.engine.long_context import Merged
from dask_pcm.inference.engine.pages import PAGE_TOKENS
from dask_pcm.inference.engine.rows import RowError
from dask_pcm.inference.engine.timeslice import Kind, Owner, TimeSlices
from tests.inference.engine.conftest import FAMILIES
from tests.inference.engine.test_engine import ENDINGS, text
from tests.inference.engine.test_schedule import checked, expected, first_step
from tests.support.lenders import Lender

QUESTION, BATCH = Owner(Kind.QUESTION, "me"), Owner(Kind.BATCH, "job")


@pytest.fixture
def model(alone):
    return alone("llama")


def noted_logits(driven):
    """Logits of single rows, step by step."""
    found, compute = [], driven.engine._forward.logits

    def logits(pack, kept=None):
        found.append(compute(pack, kept))
        return found[-1]

    driven.engine._forward.logits = logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_a_row_that_fits(alone, family):
    """Attention in groups, with windows, caps and sinks; positions that are learned."""
    one, prompt = alone(family), text(random.Random(1), 100)
    driven = one.engine(n_pages=4, budget_tokens=32)
    logits = noted_logits(driven)
    driven.generate("row", prompt, 12)
    found = checked(driven)["row"]
    assert found == one.continued(prompt, 12)
    undivided = one.logits([*prompt, *found[:-1]])[len(prompt) - 1 :]
    told = torch.stack([one[-1] for one in logits if one.shape[-1] == undivided.shape[-1]])
    assert (told - undivided).abs().max() < 1e-4
    assert driven.engine.paging.n_sent >= 5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_endings_that_share_tokens_are_scored(alone, family):
    one, prompt = alone(family), text(random.Random(2), 130)
    driven = one.engine(n_pages=4, budget_tokens=32)
    driven.score("row", prompt, ENDINGS)
    assert checked(driven)["row"] == pytest.approx(one.scores(prompt, ENDINGS), abs=1e-4)
    assert driven.engine.paging.n_sent


def test_a_row_that_grows_beyond_the_device_goes_on(model):
    driven, prompt = model.engine(n_pages=4), text(random.Random(3), 20)
    driven.generate("row", prompt, 80)
    assert checked(driven)["row"] == model.continued(prompt, 80)
    assert driven.engine.paging.n_recomputed == 0


def test_each_page_is_sent_once(model):
    driven, prompt = model.engine(n_pages=4), text(random.Random(4), 200)
    driven.generate("row", prompt, 20)
    checked(driven)
    assert driven.engine.paging.n_sent <= 220 // 16


def test_a_question_begins_at_once_beside_a_long_row(model):
    driven, rng = model.engine(n_pages=8, budget_tokens=64), random.Random(5)
    prompts = {"long": text(rng, 200), "question": text(rng, 20)}
    driven.generate("long", prompts["long"], 40, owner=BATCH)
    for _ in range(8):
        driven.engine.step()
    driven.generate("question", prompts["question"], 6, owner=QUESTION, number="question")
    assert first_step(driven, "question") == 1
    assert checked(driven) == expected(model, prompts, {"long": 40, "question": 6})


def test_rows_that_share_a_prefix_too_long_for_the_device_do_without_it(model):
    driven, rng = model.engine(n_pages=6, budget_tokens=64), random.Random(6)
    shared = text(rng, 150)
    prompts = {k: [*shared, 5 + k] for k in range(3)}
    driven.generate_all(prompts, 5, owner=BATCH)
    assert checked(driven) == expected(model, prompts, 5)


def test_one_that_outgrows_the_device_with_its_prefix_leaves_it(model):
    driven, rng = model.engine(n_pages=6, budget_tokens=64), random.Random(6)
    shared = text(rng, 40)
    prompts = {k: [*shared, 5 + k] for k in range(3)}
    driven.generate_all(prompts, 70, owner=BATCH)
    assert checked(driven) == expected(model, prompts, 70)


def test_without_memory_off_the_device_it_fails_and_says_so(model):
    page_bytes = model.engine().pool.kv[0].nbytes
    driven, rng = model.engine(n_pages=4, most_bytes=3 * page_bytes), random.Random(7)
    prompts = {"short": text(rng, 20), "fits": text(rng, 90), "too long": text(rng, 200)}
    driven.generate_all(prompts, 5, owner=BATCH)
    driven.generate("grows", text(rng, 100), 30, owner=BATCH)
    driven.engine.step()
    assert set(driven.found) == {"too long"}  # before it takes the room of others
    found = checked(driven)
    failed, grown = found.pop("too long"), found.pop("grows")
    assert isinstance(failed, RowError) and isinstance(grown, RowError)
    assert "more than 113 tokens" in str(grown)
    for part in ("more than 200", "64 on the device", "48 in the host's", "host-pages"):
        assert part in str(failed)
    del prompts["too long"]
    assert found == expected(model, prompts, 5)


def first_of_a_question(model, driven, prompt):
    driven.generate("question", prompt, 4, owner=QUESTION, number="question")
    steps = first_step(driven, "question")
    assert checked(driven)["question"] == expected(model, {"question": prompt}, 4)["question"]
    return steps


@pytest.mark.parametrize("n_lent", [0, 16, 64])
def test_one_for_which_lenders_have_too_little_takes_nothing_from_others(
    model, n_lent, monkeypatch
):
    monkeypatch.setattr("dask_pcm.inference.engine.holdings._PATIENCE_S", 0.0)
    page_bytes = model.engine(n_pages=1).pool.kv[0].nbytes
    driven = model.engine(n_pages=20, budget_tokens=64, most_bytes=20 * page_bytes)
    lender = Lender(host=n_lent * page_bytes)
    driven.engine.paging.lend(lender.borrow, lender.wake)
    rng = random.Random(1)
    for key in range(6):
        driven.generate(key, text(rng, 30), 30, owner=BATCH)
    driven.generate("long", text(rng, 80 * PAGE_TOKENS), 3, owner=QUESTION)
    driven.engine.step()
    has_failed = isinstance(driven.found.get("long"), RowError)
    assert has_failed is (n_lent < 64)
    found = checked(driven)
    if has_failed:
        assert driven.engine.paging.n_recomputed == 0
        assert f"for {n_lent * PAGE_TOKENS:,} in memory that is lent" in str(found["long"])
        assert all(loan.is_closed for loan in lender.loans)
    else:
        assert len(found["long"]) == 3


def test_a_new_row_waits_for_lenders_for_a_moment(model):
    page_bytes = model.engine(n_pages=1).pool.kv[0].nbytes
    driven = model.engine(n_pages=20, budget_tokens=64, most_bytes=20 * page_bytes)
    lender, rng = Lender(), random.Random(1)
    driven.engine.paging.lend(lender.borrow, lender.wake)
    driven.generate("beside", text(rng, 30), 60, owner=BATCH)
    driven.generate("long", text(rng, 80 * PAGE_TOKENS), 3, owner=QUESTION)
    for _ in range(5):
        driven.engine.step()
    assert not driven.found  # it does not fail because lenders had nothing at one moment
    lender.left["host"] = 64 * page_bytes
    assert len(checked(driven)["long"]) == 3


@pytest.mark.parametrize("n_prefix", [70, 80])
def test_questions_do_not_wait_for_one_that_has_outgrown_the_device_with_its_prefix(
    model, n_prefix
):
    driven, rng = model.engine(n_pages=12, budget_tokens=64), random.Random(9)
    shared = text(rng, n_prefix)
    for k in range(2):
        driven.generate(k, [*shared, 5 + k], 600 * k + 1, owner=BATCH)
    (_, row) = driven.engine.schedule._new
    while not row.n_out:
        driven.engine.step()
    assert first_of_a_question(model, driven, text(rng, 20)) <= 3


@pytest.mark.parametrize("n_host", [4, 8, 12, 16, 20])
def test_questions_do_not_wait_where_host_memory_is_short(model, n_host):
    page_bytes = model.engine().pool.kv[0].nbytes
    driven = model.engine(
        n_pages=10, budget_tokens=64, most_bytes=n_host * page_bytes, may_recompute=False
    )
    rng = random.Random(10)
    prompts = {k: text(rng, 30) for k in range(5)}
    lengths = {k: 100 if k else 180 for k in prompts}
    driven.generate_all(prompts, lengths, owner=BATCH)
    row = driven.engine.schedule._new[0]
    while len(row.tokens) < 180:
        driven.engine.step()
    prompt = text(rng, 20)
    assert first_of_a_question(model, driven, prompt) <= 6
    del driven.found["question"]
    assert driven.found == expected(model, prompts, lengths)


def test_a_long_row_that_is_scored_gives_way_to_questions(model):
    driven, rng = model.engine(n_pages=10, budget_tokens=32), random.Random(11)
    driven.score("scored", text(rng, 230), ENDINGS)
    for _ in range(5):
        driven.engine.step()
    assert first_of_a_question(model, driven, text(rng, 120)) <= 6


def test_what_is_on_its_way_off_the_device_is_not_read_by_the_host(model):
    """On a GPU copies are not waited for, except where the host reads them next."""
    driven = model.engine(n_pages=8)
    paging, waited = driven.engine.paging, []
    paging._wait = lambda: (waited.append(driven.engine.n_steps), setattr(paging, "_is_sending", 0))
    driven.generate("row", text(random.Random(12), 200), 20)
    (row,) = driven.engine.schedule._new
    while not row.n_out:
        driven.engine.step()
    assert not waited  # on the host nothing is on its way
    paging._is_sending = True
    driven.engine.schedule._held.preempt(row)
    driven.engine.schedule._requeue()
    driven.engine.step()
    assert row.n_out and waited == [driven.engine.n_steps - 1]
    checked(driven)


def test_one_that_is_dropped_leaves_nothing(model):
    driven = model.engine(n_pages=4)
    driven.generate("row", text(random.Random(8), 200), 30)
    (row,) = driven.engine.schedule._new
    while not row.n_out:
        driven.engine.step()
    driven.engine.drop([row])
    assert checked(driven) == {}


@pytest.mark.parametrize("budget", [16, 64])
@pytest.mark.parametrize(("n_pages", "n_host"), [(1, 3), (2, 1), (3, 0), (4, 3), (5, 6)])
def test_a_row_may_fill_all_room_and_not_more(model, n_pages, n_host, budget):
    page_bytes = model.engine().pool.kv[0].nbytes
    prompt, most = text(random.Random(13), 30), (n_pages + n_host) * PAGE_TOKENS
    for n_stored in (most, most + 1):
        driven = model.engine(n_pages, budget, most_bytes=n_host * page_bytes)
        n_new = n_stored + 1 - len(prompt)  # the last one is not stored
        driven.generate("row", prompt, n_new)
        found = checked(driven)["row"]
        if n_stored == most:
            assert found == expected(model, {"row": prompt}, n_new)["row"]
        else:
            assert isinstance(found, RowError)


def streaming(model, n_pages=8, **off_device):
    """An engine, and a row of it that runs while its first pages are off the device."""
    driven = model.engine(n_pages, **off_device)
    driven.generate("row", text(random.Random(14), 100 + 16 * n_pages), 20)
    (row,) = driven.engine.schedule._new
    while len(row.tokens) == row.n_prompt:
        driven.engine.step()
    assert row.n_out
    return driven, row


def test_a_row_that_runs_leaves_memory_that_is_wanted_back_though_there_is_no_other(model):
    page_bytes = model.engine().pool.kv[0].nbytes
    prompt = text(random.Random(15), 180)
    driven = model.engine(8, most_bytes=0)
    lender = Lender(host=64 * page_bytes)
    driven.engine.paging.lend(lender.borrow, lender.wake)
    driven.generate("row", prompt, 20)
    (row,) = driven.engine.schedule._new
    while len(row.tokens) == row.n_prompt:
        driven.engine.step()
    lender.loans[0].want_back()
    driven.engine.evacuate()
    driven.engine.schedule._held.validate()
    assert lender.loans[0].is_closed and not row.n_done
    assert driven.engine.n_rows == 1  # it waits, and is not forgotten
    lender.left = {"host": 64 * page_bytes}
    assert checked(driven) == expected(model, {"row": prompt}, 20)


def test_one_that_comes_back_has_as_many_pages_on_the_device_as_before(model):
    driven, row = streaming(model)
    before = row.n_out
    driven.engine.schedule._held.preempt(row)
    driven.engine.schedule._requeue()
    driven.engine.step()
    assert before - 1 <= row.n_out <= before + 1


def test_what_is_outside_of_a_window_is_not_read(alone, monkeypatch):
    n_read = []

    def read(places, layer, device, real=long_context._read):
        n_read.append(len(places))
        return real(places, layer, device)

    monkeypatch.setattr(long_context, "_read", read)
    driven, row = streaming(alone("mistral"), n_pages=4)
    n_read.clear()
    driven.engine.step()
    assert row.n_out > 4 and sum(n_read) == 0  # a window of 8 tokens: all of it is on the device


@pytest.mark.parametrize("seed", range(16))
def test_no_schedule_changes_a_token(model, seed):
    """Rows of all lengths, those who ask and those who lend come and go; some rows are dropped."""
    rng = random.Random(seed)
    prompts = {k: text(rng, rng.choice([5, 20, 60, 150])) for k in range(rng.randint(4, 9))}
    lengths = {key: rng.randint(1, 40) for key in prompts}
    n_pages = rng.choice([1, 2, 3, 5, 7, 9])
    driven = model.engine(n_pages, rng.choice([16, 48]))
    page_bytes = driven.pool.kv[0].nbytes
    driven = model.engine(
        n_pages,
        rng.choice([16, 48]),
        most_bytes=rng.choice([0, 10, 20, 200]) * page_bytes,
        may_recompute=rng.choice([True, False]),
    )
    engine = driven.engine
    engine.schedule._slices = engine.schedule._held.slices = TimeSlices(rng.choice([1, 4, 16]))
    lent_bytes = rng.choice([0, 16, 64]) * page_bytes
    lender = Lender(device=lent_bytes, host=lent_bytes)
    if lent_bytes:
        engine.paging.lend(lender.borrow, lender.wake)
    todo = list(prompts)
    while todo or engine.n_rows:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if todo:
                key = todo.pop()
                owner = Owner(rng.choice([*Kind]), rng.choice("ab"))
                driven.generate(key, prompts[key], lengths[key], owner=owner)
        if rng.random() < 0.1 and (loans := [one for one in lender.loans if not one.is_closed]):
            loans[0].want_back()
            engine.evacuate()
            assert loans[0].is_closed
            lender.left = dict.fromkeys(lender.left, lent_bytes)
        if rng.random() < 0.01 and (rows := engine.schedule._all_waiting()):
            engine.drop([rng.choice(rows)])
        engine.step()
        engine.schedule._held.validate()
    right = expected(model, prompts, lengths)
    for key, found in checked(driven).items():
        n_pages_all = n_pages + engine.paging.slabs.most_pages + 2 * lent_bytes // page_bytes
        has_room = len(prompts[key]) + lengths[key] <= (n_pages_all - 1) * PAGE_TOKENS
        assert found == right[key] or (isinstance(found, RowError) and not has_room)


@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_attention_are_the_whole(seed):
    """Against a softmax of all scores; some pieces have no key that a token sees."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens, n_keys = 5, 40

    def random_of(*sizes):
        return torch.randn(*sizes, generator=generator)

    q, k, v = random_of(4, n_tokens, 8), random_of(2, n_keys, 8), random_of(2, n_keys, 6)
    seen = torch.rand(n_tokens, n_keys, generator=generator) < 0.3
    seen[:, -1] = True
    cap, sink = (3.0 if seed % 2 else None), (random_of(4) if seed % 3 else None)
    total = Merged(q, 2, 6, 0.5, cap)
    for begin in range(0, n_keys, 7):
        some = slice(begin, begin + 7)
        total.add(k[:, some], v[:, some], seen[:, some])
    scores = (q @ k.repeat_interleave(2, 0).transpose(1, 2)) * 0.5
    scores = scores if cap is None else cap * (scores / cap).tanh()
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink is not None:
        total.add_sink(sink)
        scores = torch.cat([scores, sink.view(4, 1, 1).expand(-1, n_tokens, 1)], -1)
    weights = scores.softmax(-1)[..., :n_keys]
    whole = (weights @ v.repeat_interleave(2, 0)).transpose(0, 1)
    assert torch.allclose(total.result(), whole, atol=1e-6)
