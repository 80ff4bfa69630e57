"""Tokens are drawn with the probabilities that the model gives, by row and position."""

from __future__ import annotations

import pytest
import torch

from dask_pcm.errors import PromptError
from dask_pcm.inference.engine.sampling import Sampling, choose, gumbel

LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0]])


def shares(sampling, n=4000):
    """How often each token is drawn."""
    tokens = choose(LOGITS.expand(n, -1), sampling, [7] * n, range(n))
    return torch.bincount(tokens, minlength=4) / n


def test_tokens_are_drawn_as_often_as_the_model_says():
    assert torch.allclose(shares(Sampling(1.0)), LOGITS[0].softmax(-1), atol=0.03)
    assert torch.allclose(shares(Sampling(2.0)), (LOGITS[0] / 2).softmax(-1), atol=0.03)
    assert shares(Sampling()).tolist() == [0, 0, 0, 1]


def test_only_the_likeliest_are_drawn():
    two = LOGITS[0, 2:].softmax(-1)
    assert torch.allclose(shares(Sampling(1.0, top_k=2))[2:], two, atol=0.03)
    assert torch.allclose(shares(Sampling(1.0, top_p=0.8))[2:], two, atol=0.03)
    assert shares(Sampling(1.0, top_p=0.1)).tolist() == [0, 0, 0, 1]
    assert torch.allclose(shares(Sampling(1.0, top_k=9)), LOGITS[0].softmax(-1), atol=0.03)


def test_noise_differs_by_seed_row_and_position_and_is_the_same_again():
    like = torch.zeros(1, 50_000)
    found = [
        gumbel(s, [r], [p], like)[0] for s, r, p in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert torch.equal(found[0], gumbel(0, [0], [0], like)[0])
    assert torch.corrcoef(torch.stack(found)).fill_diagonal_(0).abs().max() < 0.02
    # Mean and deviation of the standard Gumbel distribution.
    assert found[0].mean() == pytest.approx(0.5772, abs=0.03)
    assert found[0].std() == pytest.approx(1.2825, abs=0.03)
    assert gumbel(-(1 << 70), [1 << 65], [3], like).isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature is -1; expected 0 or more"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; expected 1 or more, or None"),
        ({"top_p": 0}, "top_p is 0; expected above 0 and at most 1"),
        ({"top_p": True}, "top_p is True"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(PromptError, match=words):
        Sampling(**options)
