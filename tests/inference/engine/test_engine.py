"""Rows have the results that they have alone, with any others beside them."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from dask_pcm.inference.engine.attention import packed, switch
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.rows import Embedded, Pooling, RowError
from dask_pcm.inference.engine.sampling import Sampling
from tests.inference.engine.conftest import FAMILIES
from tests.support import models as tiny

ENDINGS = ((11, 12, 3), (11, 13, 14, 3), (15, 3), (11, 13, 16, 17, 3))


def text(rng, n):
    return [rng.randrange(20, 590) for _ in range(n)]


def prompts_of(rng):
    """Rows of many lengths, some of which begin alike, on two levels."""
    instructions = text(rng, 40)
    evidence = [[*instructions, *text(rng, 30)] for _ in range(2)]
    rows = [[*evidence[k % 2], *text(rng, rng.randint(1, 20))] for k in range(6)]
    rows += [[*instructions, *text(rng, 5)], text(rng, 1), text(rng, 16), text(rng, 150)]
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_tokens_are_those_of_each_row_alone(alone, family):
    rng = random.Random(0)
    one, prompts = alone(family), prompts_of(rng)
    expected = {("score", k): one.scores(row, ENDINGS) for k, row in enumerate(prompts)}
    expected.update({("new", k): one.continued(row, 6) for k, row in enumerate(prompts)})
    driven = one.engine()
    for k, row in enumerate(prompts):
        driven.score(("score", k), row, ENDINGS)
        driven.generate(("new", k), row, 6)
    found = driven.run()
    for k in range(len(prompts)):
        assert found["score", k] == pytest.approx(expected["score", k], abs=1e-4)
        assert found["new", k] == expected["new", k]


@pytest.mark.parametrize(("n_pages", "budget_tokens"), [(400, 1000), (40, 50), (16, 17), (13, 3)])
def test_no_size_of_pool_or_step_changes_a_result(alone, n_pages, budget_tokens):
    rng = random.Random(1)
    one, prompts = alone("mistral"), prompts_of(rng)
    expected = [(one.scores(row, ENDINGS), one.continued(row, 8)) for row in prompts]
    driven = one.engine(n_pages, budget_tokens)
    for k, row in enumerate(prompts):
        driven.score(("score", k), row, ENDINGS)
        driven.generate(("new", k), row, 8)
        for _ in range(k % 3):  # rows come while others are computed
            driven.engine.step()
    found = driven.run()
    for k, (scores, new) in enumerate(expected):
        assert found["score", k] == pytest.approx(scores, abs=1e-4)
        assert found["new", k] == new
    while driven.engine.schedule.prefixes.drop_one():
        pass
    assert driven.pool.n_free == n_pages


def test_what_rows_share_is_computed_once(alone):
    rng = random.Random(2)
    one = alone("llama")
    driven = one.engine(budget_tokens=256)
    shared = text(rng, 100)
    for k in range(20):
        driven.score(k, [*shared, *text(rng, 5)], ((11,), (12,)))
    driven.run()
    assert driven.engine.n_tokens == 100 + 20 * 5
    driven.score("later", [*shared, *text(rng, 7)], ((11,), (12,)))  # and kept
    driven.score("shorter", [*shared[:90], *text(rng, 7)], ((11,), (12,)))
    driven.run()
    assert driven.engine.n_tokens == 100 + 20 * 5 + 7 + 97


def test_rows_that_are_scored_alone_take_no_pages(alone):
    driven = alone("llama").engine(n_pages=1)
    for k in range(8):
        driven.score(k, text(random.Random(k), 30), ENDINGS)
    assert len(driven.run()) == 8 and driven.pool.n_free == 1


def test_a_row_that_no_pool_can_hold_fails_and_the_others_go_on(alone):
    rng = random.Random(3)
    one = alone("llama")
    short = text(rng, 20)
    expected = one.continued(short, 4)
    driven = one.engine(n_pages=4, most_bytes=0)
    driven.generate("long", text(rng, 80), 4)
    driven.generate("grows", text(rng, 60), 30)
    driven.generate("short", short, 4)
    found = driven.run()
    assert found["short"] == expected
    for key in ("long", "grows"):
        assert isinstance(found[key], RowError)
        assert "There is room for 64 on the device, for 0 in the host's" in str(found[key])


def test_a_row_ends_at_a_stop_token_at_its_limit_or_where_it_is_told(alone):
    rng = random.Random(4)
    one, row = alone("llama"), text(rng, 20)
    new = one.continued(row, 8)
    driven = one.engine()
    driven.generate("stop", row, 8, stops=frozenset({new[3]}))
    driven.generate("limit", row, 2)
    driven.generate("told", row, 8, is_over=lambda tokens: len(tokens) == 5)
    found = driven.run()
    first = new.index(new[3])
    assert found == {"stop": new[:first], "limit": new[:2], "told": new[:5]}


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=7), Sampling(0.7, top_k=20, top_p=0.9)])
def test_samples_depend_on_the_row_and_the_seed_alone(alone, sampling):
    rng = random.Random(5)
    one = alone("llama")
    prompts = [text(rng, rng.randint(1, 40)) for _ in range(12)]
    found = []
    for n_pages, budget, order in ((200, 64, 1), (20, 17, -1), (400, 1000, 1)):
        driven = one.engine(n_pages, budget)
        for k in range(len(prompts))[::order]:
            driven.generate(k, prompts[k], 10, sampling=sampling, number=k)
        found.append(driven.run())
    assert found[0] == found[1] == found[2]
    driven = one.engine()
    for k, row in enumerate(prompts):
        driven.generate(k, row, 10, sampling=Sampling(1.0, seed=8), number=k)
        driven.generate(("same text", k), prompts[0], 10, sampling=sampling, number=k)
    others = driven.run()
    assert all(others[k] != found[0][k] for k in range(len(prompts)))
    assert len({tuple(others["same text", k]) for k in range(12)}) > 6


def test_steps_are_full_while_there_are_rows(alone):
    rng = random.Random(6)
    driven = alone("llama").engine(budget_tokens=512)
    for k in range(400):
        driven.score(k, text(rng, rng.randint(5, 60)), ((11,), (12,)))
    driven.run()
    assert driven.engine.n_tokens / driven.engine.n_steps >= 0.95 * 512


@pytest.mark.parametrize("how", Pooling)
def test_embeddings_are_those_of_each_row_alone(alone, how):
    rng = random.Random(7)
    one = alone("llama")
    rows = [text(rng, rng.randint(1, 90)) for _ in range(9)]
    with torch.inference_mode():
        hidden = [one.model.model(input_ids=torch.tensor([row])).last_hidden_state for row in rows]
    driven = one.engine()
    for k, row in enumerate(rows):
        driven.engine.add([Embedded(row, partial(driven.found.__setitem__, k), pooling=how)])
        driven.score(("beside", k), row, ENDINGS)  # in forwards of their own
    found = driven.run()
    for k, expected in enumerate(hidden):
        pooled = {"mean": expected[0].mean(0), "cls": expected[0, 0], "last": expected[0, -1]}
        assert torch.allclose(torch.tensor(found[k]), pooled[how.value], atol=1e-5)
    assert len(found) == 18


def test_an_encoder_that_is_packed_says_what_it_says_of_each_row_alone():
    rng = random.Random(8)
    config = {**tiny.ATTENTION, "num_hidden_layers": 2}
    model = tiny.random_model("BertModel", "BertConfig", **config)
    model.set_attn_implementation("eager")
    rows = [text(rng, n) for n in (3, 40, 17, 41, 1, 12, 9)]
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]
        switch(model)
        pack = Pack([Segment(row, range(len(row))) for row in rows], is_causal=False)
        with packed(pack):
            hidden = model(input_ids=pack.ids, position_ids=pack.positions).last_hidden_state[0]
    for one, start in zip(expected, pack.starts, strict=True):
        assert torch.allclose(hidden[start : start + len(one)], one, atol=1e-5)


def test_what_is_not_a_number_is_the_error_of_its_row_alone(alone):
    rng = random.Random(9)
    one = alone("llama")
    with torch.no_grad():
        one.model.get_input_embeddings().weight[599] = torch.nan
    rows = prompts_of(rng)
    expected = [(one.scores(row, ENDINGS), one.continued(row, 4)) for row in rows]
    driven = one.engine(n_pages=30, budget_tokens=50)
    shared = [*text(rng, 50), 599, *text(rng, 30)]  # a prefix, and rows with pages of their own
    bad = [[599], [*rows[0], 599], [*rows[1][:80], 599, *text(rng, 20)]]
    bad += [[*shared, *text(rng, 3)] for _ in range(3)]
    for turn in range(2):  # pages are used again
        for k in range(len(rows)):
            driven.score((turn, "score", k), rows[k], ENDINGS)
            driven.generate((turn, "new", k), rows[k], 4)
            row = bad[k % len(bad)]
            driven.score((turn, "bad score", k), row, ENDINGS)
            driven.generate((turn, "bad", k), row, 4)
    found = driven.run()
    for (_, kind, k), result in found.items():
        if kind.startswith("bad"):
            assert isinstance(result, RowError) and "not a number" in str(result)
        elif kind == "new":
            assert result == expected[k][1]
        else:
            assert result == pytest.approx(expected[k][0], abs=1e-4)


@pytest.mark.parametrize("n_texts", [3, 400])
def test_short_rows_do_not_wait_for_all_texts_that_are_generated(alone, n_texts):
    rng = random.Random(12)
    driven = alone("llama").engine(budget_tokens=512, n_pages=4000)
    for k in range(n_texts):
        driven.generate(("text", k), text(rng, 12), 120)
    for _ in range(4):
        driven.engine.step()
    driven.score("score", text(rng, 9), ENDINGS)
    driven.engine.add(
        [Embedded(text(rng, 7), partial(driven.found.__setitem__, "vector"), pooling=Pooling.MEAN)]
    )
    for _ in range(5):
        driven.engine.step()
    assert {"score", "vector"} <= set(driven.found)
    assert not any(("text", k) in driven.found for k in range(n_texts))
    assert len(driven.run()) == n_texts + 2
