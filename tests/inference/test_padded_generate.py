"""Texts that transformers' ``generate`` continues, in batches that mix nothing."""

from __future__ import annotations

import pytest
import torch

from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.padded_generate import continue_rows, continues_batches
from tests.support import models as tiny


@pytest.mark.parametrize("kind", ["RwkvForCausalLM", "MambaForCausalLM"])
def test_rows_that_are_continued_together_have_the_tokens_that_they_have_alone(kind):
    """RWKV mixes the states of a batch's rows."""
    options = {"attention_hidden_size": 32, "context_length": 256} if kind[0] == "R" else {}
    made = tiny.random_model(kind, kind.replace("ForCausalLM", "Config"), **tiny.SMALL, **options)
    model = PaddedModel(made, tiny.tokenizer())
    rows = [[5 + (n * k + n) % 90 for k in range(12)] for n in (7, 11, 13)]

    def alone(row):
        whole = list(row)
        for _ in range(5):
            with torch.inference_mode():
                logits = made(input_ids=torch.tensor([whole]), use_cache=False).logits
            whole.append(int(logits[0, -1].argmax()))
        return whole[len(row) :]

    found = continue_rows(model, rows, [0, 1, 2], [5, 5, 5], Sampling(), None, 1000, model.stops)
    assert found == [alone(row) for row in rows]
    assert continues_batches(model) == (kind[0] == "M")
