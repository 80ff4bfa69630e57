"""With ``deterministic=True`` a row's results are the same, to the last bit, in any batch."""

from __future__ import annotations

import random

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import ModelError
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.padded_generate import continue_rows, continues_batches
from tests.inference.test_embed import ENCODERS, words
from tests.support import models as tiny

CHOICES = [" yes", " no", " maybe not"]


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    known = "the moon is round yes no maybe Answer Claim a b c d".split()
    return [" ".join(rng.choices(known, k=rng.choice([1, 3, 8, 20, 21, 40]))) for _ in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Wide enough for its scores to differ with the shapes of forwards.
    made = tiny.llama(hidden_size=64, num_hidden_layers=2)
    return tiny.saved(tmp_path_factory.mktemp("model"), made)


def loaded(folder, **options):
    return load_model(str(folder), "bfloat16", "cpu", **options)


def results(model, texts):
    """By text: scores, sampled and greedy tokens, and a vector."""
    answers = model.classify(texts, CHOICES)
    greedy = model.generate(texts, max_tokens=6)
    sampled = model.generate(texts, max_tokens=6, temperature=0.7, seed=3)
    vectors = model.embed(texts, normalize=False)
    rows = zip(texts, answers, greedy, sampled, vectors, strict=True)
    return {t: (a.logprobs, g.text, s.text, v.tobytes()) for t, a, g, s, v in rows}


def test_in_any_batch(folder, texts):
    model = loaded(folder, deterministic=True)
    assert not model.is_attended
    expected = results(model, texts)
    shuffled = random.Random(1).sample(texts, len(texts))
    assert results(model, shuffled) == expected
    for at in range(0, len(texts), 7):
        some = texts[at : at + 7]
        assert results(model, some) == {text: expected[text] for text in some}
    for text in texts[:3]:
        assert results(model, [text]) == {text: expected[text]}


def test_which_is_not_so_without(folder, texts):
    """Else the test above would say nothing."""
    model = loaded(folder)
    model.is_attended = False
    expected = results(model, texts)
    assert any(results(model, [text])[text][0] != expected[text][0] for text in texts[:8])


def test_results_are_those_of_other_batches_up_to_rounding(folder, texts):
    one, other = loaded(folder, deterministic=True), load_model(str(folder), "float32", "cpu")
    found, expected = (
        np.array([a.logprobs for a in m.classify(texts, CHOICES)]) for m in (one, other)
    )
    assert np.abs(found - expected).max() < 0.2 * expected.std()


def test_vectors_of_encoders(tmp_path, texts):
    kind, config, options = ENCODERS["bert"]
    made = tiny.random_model(kind, config, **options)
    folder = tiny.saved(tmp_path / "model", made, words())
    model = loaded(folder, deterministic=True, is_encoder=True)
    whole = model.embed(texts)
    for k, text in enumerate(texts[:8]):
        assert np.array_equal(model.embed([text])[0], whole[k])


def test_rows_longer_than_what_a_length_is_rounded_to_still_fit(tmp_path):
    """A model with 50 positions takes texts of 50 tokens, although 64 is the next length."""
    options = {"vocab_size": tiny.N_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    made = tiny.random_model("GPT2LMHeadModel", "GPT2Config", **options, n_positions=50)
    model = loaded(tiny.saved(tmp_path / "model", made), deterministic=True)
    assert model.padded.max_tokens == 50
    n = next(n for n in range(200) if len(model.padded.tokenize(["a b " * n])[0]) > 44)
    (found,) = model.classify(["a b " * n], [" a", " b"])
    assert found.error is None


def test_a_length_is_not_rounded_over_that_of_other_frequencies(texts, tmp_path):
    """LongRoPE: rows of up to 100 tokens have other frequencies than longer ones."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 100,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    }
    options = {**tiny.ATTENTION, "pad_token_id": 0, "original_max_position_embeddings": 100}
    made = tiny.random_model("Phi3ForCausalLM", "Phi3Config", **options, rope_parameters=rope)
    folder = tiny.saved(tmp_path / "model", made)
    fixed, plain = (
        load_model(str(folder), "float32", "cpu", deterministic=d) for d in (True, False)
    )
    assert fixed.padded.shapes.short_tokens == 100
    n = next(n for n in range(200) if len(fixed.padded.tokenize(["a b " * n])[0]) > 96)
    found, expected = (one.embed(["a b " * n, *texts]) for one in (fixed, plain))
    assert np.abs(found - expected).max() < 1e-4


def test_experts_have_the_tokens_of_one_row(tmp_path, texts):
    options = {**tiny.ATTENTION, "num_local_experts": 4, "num_key_value_heads": 2}
    made = tiny.random_model("MixtralForCausalLM", "MixtralConfig", **options)
    model = loaded(tiny.saved(tmp_path / "model", made), deterministic=True)
    assert model.padded.shapes.n_rows == 1
    n_tokens = []
    made = model.padded.model
    made.register_forward_pre_hook(
        lambda module, args, kwargs: n_tokens.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    model.classify(texts[:4], CHOICES)
    model.generate(texts[:3], max_tokens=3)
    assert set(n_tokens) == {1}


def test_what_is_continued_row_by_row_is_not_filled_up():
    options = {**tiny.SMALL, "attention_hidden_size": 32, "context_length": 256}
    made = tiny.random_model("RwkvForCausalLM", "RwkvConfig", **options)
    model = PaddedModel(made, tiny.tokenizer(), is_deterministic=True)
    rows, calls = [[5, 6, 7, 8], [9, 8, 7, 6]], []
    assert not continues_batches(model)
    real = made.generate
    made.generate = lambda *a, **kw: calls.append(1) or real(*a, **kw)
    found = continue_rows(model, rows, [0, 1], [3, 3], Sampling(), None, 1000, frozenset())
    assert len(calls) == 2 and all(len(one) == 3 for one in found)


def test_an_llm_says_so_and_is_another_context(folder, texts):
    plain, fixed = pcm.LLM(folder), pcm.LLM(folder, deterministic=True)
    assert plain.ref.digest != fixed.ref.digest
    assert pcm.LLM(folder, deterministic=False).ref.digest == plain.ref.digest
    with pytest.raises(ModelError, match="deterministic must be True or False; found 1"):
        pcm.LLM(folder, deterministic=1)
    frame = pd.DataFrame({"id": range(len(texts)), "text": texts})
    llm = pcm.LLM(folder, dtype="bfloat16", device="cpu", deterministic=True)
    found = []
    for n in (1, 6):
        ddf = dd.from_pandas(frame, npartitions=n)
        with dask.config.set(scheduler="sync"):
            out = pcm.classify(ddf, llm, prompt="{text}", choices=CHOICES, logprobs=True)
            found.append(out.compute().logprobs.tolist())
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
