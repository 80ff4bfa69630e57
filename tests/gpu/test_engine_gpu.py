"""The engine on a GPU, beside the model's rows alone on the CPU."""

from __future__ import annotations

import random

import pytest

from dask_pcm.inference.engine.pages import PagePool
from dask_pcm.inference.engine.paging import Paging
from tests.inference.engine.conftest import FAMILIES, Alone
from tests.inference.engine.test_engine import ENDINGS, prompts_of
from tests.inference.engine.test_paging import SHAPE, SLAB_BYTES, back, made, stored
from tests.support.lenders import Lender

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_tokens_are_those_of_each_row_alone(family):
    rng = random.Random(0)
    one, prompts = Alone(family), prompts_of(rng)
    expected = [(one.scores(row, ENDINGS), one.continued(row, 6)) for row in prompts]
    one.model.to("cuda")
    driven = one.engine()
    for k, row in enumerate(prompts):
        driven.score(("score", k), row, ENDINGS)
        driven.generate(("new", k), row, 6)
    found = driven.run()
    assert not driven.engine.n_failed
    for k, (scores, new) in enumerate(expected):
        assert found["score", k] == pytest.approx(scores, abs=1e-3)
        assert found["new", k] == new


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_differs_by_its_rounding(family):
    rng = random.Random(1)
    one, prompts = Alone(family), prompts_of(rng)
    one.model.to(torch.bfloat16).to(torch.float32)  # so that both have the same weights
    expected = [one.scores(row, ENDINGS) for row in prompts]
    one.model.to("cuda", torch.bfloat16)
    driven = one.engine()
    for k, row in enumerate(prompts):
        driven.score(k, row, ENDINGS)
    found = driven.run()
    assert not driven.engine.n_failed
    for k, scores in enumerate(expected):
        assert found[k] == pytest.approx(scores, rel=0.05, abs=0.3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_tokens_in_bfloat16_are_about_the_likeliest(family):
    rng = random.Random(2)
    one, prompts = Alone(family), prompts_of(rng)
    one.model.to("cuda", torch.bfloat16)
    driven = one.engine(budget_tokens=1000)
    for k, row in enumerate(prompts):
        driven.generate(k, row, 3 + k)
    found = driven.run()
    assert not driven.engine.n_failed
    graphs = driven.engine._graphs
    assert graphs.is_on and graphs._made  # steps of single tokens were graphs
    one.model.to("cpu", torch.float32)
    for k, row in enumerate(prompts):
        assert len(found[k]) == 3 + k
        logits = one.logits([*row, *found[k]])[len(row) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(found[k])[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 0.3


def test_texts_in_bfloat16_go_on_from_their_drafts():
    """They begin with the draft, and every later token is about the likeliest."""
    rng = random.Random(3)
    one, prompts = Alone("llama"), prompts_of(rng)
    one.model.to("cuda", torch.bfloat16)
    whole = one.engine(budget_tokens=1000)
    for k, row in enumerate(prompts):
        whole.generate(k, row, 12)
    drafts = {k: new[: 1 + k % 9] for k, new in whole.run().items()}
    again = one.engine(budget_tokens=1000)
    for k, row in enumerate(prompts):
        again.generate(k, row, 12, draft=drafts[k])
    found = again.run()
    assert not again.engine.n_failed
    one.model.to("cpu", torch.float32)
    for k, row in enumerate(prompts):
        assert len(found[k]) == 12 and found[k][: len(drafts[k])] == drafts[k]
        logits = one.logits([*row, *found[k]])[len(row) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(found[k])[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_the_device_has_no_room_for_are_streamed(family):
    one, prompt = Alone(family), prompts_of(random.Random(5))[0][:1] * 100
    expected = one.scores(prompt, ENDINGS), one.continued(prompt, 12)
    one.model.to("cuda")
    driven = one.engine(n_pages=4, budget_tokens=32)
    driven.score("score", prompt, ENDINGS)
    driven.generate("new", prompt, 12)
    found = driven.run()
    assert driven.engine.paging.n_sent and not driven.engine.n_failed
    assert found["score"] == pytest.approx(expected[0], abs=1e-3)
    assert found["new"] == expected[1]


@pytest.mark.parametrize("where", ["host", "device"])
def test_pages_in_memory_that_is_lent_come_back_and_move_on_to_the_bit(where):
    """Another allocation on the same device stands for a neighbour's."""
    pool = PagePool(40, SHAPE, torch.bfloat16, "cuda")
    paging = Paging(pool, may_recompute=False)
    lender = Lender(**{where: SLAB_BYTES})
    if where == "device":
        borrow = lender.borrow

        def on_device(rung, n_bytes):
            loan = borrow(rung, n_bytes)
            if loan is not None:
                loan._memory = loan._memory.to("cuda")
            return loan

        lender.borrow = on_device
    else:
        paging.slabs.most_pages = 0
    paging.lend(lender.borrow, lender.wake)
    row, other = made(pool, 70), made(pool, 50)
    before, kept = stored(pool, row), stored(pool, other)
    assert paging.out(row) and paging.out(other) and len(lender.loans) == 1
    back(pool, paging, row)
    assert torch.equal(stored(pool, row), before)
    lender.loans[0].want_back()
    paging.slabs.most_pages = 100
    paging.evacuate(lambda row: pytest.fail("there is room on the host"))
    assert lender.loans[0].is_closed and paging.n_moved == 4
    back(pool, paging, other)
    torch.cuda.synchronize()
    assert torch.equal(stored(pool, other), kept)
