"""Scores against an independent computation: one unpadded sequence at a time."""

from __future__ import annotations

import pytest
import torch
import transformers

from dask_pcm.errors import ModelError
from dask_pcm.factcheck import LABELS, PROMPT, generate
from dask_pcm.factcheck.demo import MODEL_PATH
from dask_pcm.inference.loading import load_model, load_onto
from dask_pcm.inference.model_folder import weight_files
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.probe import probe
from dask_pcm.inference.prompts import plan_scoring
from tests.support import models as tiny


@pytest.fixture(scope="module")
def model():
    return load_model(str(MODEL_PATH)).padded


def one_by_one(model, tokens, n_shared):
    """Sum of log P of the tokens after `n_shared`, without padding, batching or sharing."""
    import torch

    with torch.inference_mode():
        logits = model.model(torch.tensor([tokens])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return sum(float(logprobs[i - 1, tokens[i]]) for i in range(n_shared, len(tokens)))


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("choices", [LABELS, ("NOT", "NOT ENOUGH", "NOT ENOUGH INFO", "REFUTED")])
def test_scores_are_those_of_each_text_alone(model, batch_tokens, choices):
    claims = generate(12, seed=5)
    scorings = []
    for row in claims.itertuples():
        prompt = PROMPT.format(claim=row.claim, evidence=row.evidence)
        texts = [f"{prompt} {choice}" for choice in choices]
        scorings.append(plan_scoring(model.tokenize(texts), model.eos))
    found = model.score(scorings, batch_tokens)
    for scoring, scores in zip(scorings, found, strict=True):
        for ending, score in zip(scoring.endings, scores, strict=True):
            whole = [*scoring.shared, *ending]
            expected = one_by_one(model, whole, len(scoring.shared))
            assert score == pytest.approx(expected, abs=1e-4)


def test_architectures_with_other_signatures():
    """gpt2 has learned positions, which padding on the left must not shift."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model = PaddedModel(GPT2LMHeadModel(config).eval(), tokenizer)
    assert model.max_tokens == 64
    rows = [[5, 6, 7, 8, 9], [5], [5, 6, 7]]
    scorings = [plan_scoring([[*row, 10], [*row, 11, 12]], 2) for row in rows]
    found = model.score(scorings, 1000)
    for scoring, scores in zip(scorings, found, strict=True):
        for ending, score in zip(scoring.endings, scores, strict=True):
            whole = [*scoring.shared, *ending]
            assert score == pytest.approx(one_by_one(model, whole, len(scoring.shared)), abs=1e-4)


def test_missing_weights_are_an_error(tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from dask_pcm.errors import ModelError

    folder = shutil.copytree(MODEL_PATH, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing or do not fit.*up_proj"):
        load_model(str(folder))


FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen3_moe": (  # whose experts are stored one by one, and used as one tensor
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "shard"), [("auto", "1GB"), ("float32", "20KB")])
def test_weights_read_straight_into_place_are_those_of_transformers(tmp_path, family, dtype, shard):
    config, options = FAMILIES[family]
    small = SMALL if family != "gpt2" else {"vocab_size": 64}
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(**small, **options)).bfloat16()
    made.save_pretrained(tmp_path, max_shard_size=shard)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    kind = getattr(transformers, config.architectures[0])
    files = weight_files(tmp_path)
    assert len(files) > 1 if shard == "20KB" else len(files) == 1
    found = load_onto(str(tmp_path), kind, config, files, dtype, "cpu")
    for path in files:  # nothing of it is needed any more
        path.unlink()
    theirs, ours = expected.state_dict(), found.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(expected.eval()(ids).logits, found.eval()(ids).logits)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def test_weights_that_are_missing_are_named(tmp_path):
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    state = made.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    made.save_pretrained(tmp_path, state_dict=state)
    files = weight_files(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load_onto(str(tmp_path), type(made), made.config, files, "auto", "cpu")


class TestLongRope:
    """Frequencies of a whole forward are those of its longest sequence, as in Phi 3 of 128k."""

    @pytest.fixture
    def model(self):
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 80}
        made = tiny.random_model(
            "Phi3ForCausalLM",
            "Phi3Config",
            **tiny.ATTENTION,
            pad_token_id=0,
            original_max_position_embeddings=80,
            rope_parameters={
                **rope,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0, 4.0, 6.0, 8.0],
            },
        )
        return PaddedModel(made, tiny.tokenizer())

    def test_long_rows_change_no_score_of_short_ones(self, model):
        rows = [[5 + (7 * k + n) % 90 for k in range(n)] for n in (20, 76, 90, 81, 160)]
        scorings = [plan_scoring([[*row, 10], [*row, 11, 12]], 2) for row in rows]
        found = model.score(scorings, 10_000)
        for scoring, scores in zip(scorings, found, strict=True):
            for ending, score in zip(scoring.endings, scores, strict=True):
                whole = [*scoring.shared, *ending]
                expected = one_by_one(model, whole, len(scoring.shared))
                assert score == pytest.approx(expected, abs=2e-3, rel=1e-4)

    def test_no_engine_computes_it(self, model):
        assert probe(model)["unfit"].endswith("whether a row has more than 80 tokens")

    def test_an_engine_does_if_no_row_can_be_long(self, model):
        model.tokenizer.model_max_length = 80
        again = PaddedModel(model.model, model.tokenizer)
        assert again.shapes.short_tokens is None and not probe(again)["unfit"]
