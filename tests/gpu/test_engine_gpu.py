"""The engine on a GPU, beside the model's rows alone on the CPU."""

from __future__ import annotations

import random

import pytest

from tests.inference.engine.conftest import FAMILIES, Alone
from tests.inference.engine.test_engine import ENDINGS, prompts_of

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
    for k, (scores, new) in enumerate(expected):
        assert found["score", k] == pytest.approx(scores, abs=1e-3)
        assert found["new", k] == new


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_bfloat16_differs_by_its_rounding(family):
    rng = random.Random(1)
    one, prompts = Alone(family), prompts_of(rng)
    expected = [one.scores(row, ENDINGS) for row in prompts]
    one.model.to("cuda", torch.bfloat16)
    driven = one.engine()
    for k, row in enumerate(prompts):
        driven.score(k, row, ENDINGS)
    found = driven.run()
    for k, scores in enumerate(expected):
        assert found[k] == pytest.approx(scores, rel=0.02, abs=0.2)
