"""Rows of a batch have the scores that they have alone, or the model is refused as it is loaded."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from distributed import Client
from transformers.models.llama.modeling_llama import LlamaAttention

import dask_pcm as pcm
from dask_pcm.errors import ModelError
from dask_pcm.inference import loading
from dask_pcm.inference.llm import LLM
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.probe import probe
from dask_pcm.inference.prompts import plan_scoring
from tests.conftest import validated_cluster
from tests.support import models as tiny

WINDOW = {**tiny.ATTENTION, "sliding_window": 8, "max_position_embeddings": 256}
FAMILIES = {
    "learned positions": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "alibi": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 600, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "window": ("MistralForCausalLM", "MistralConfig", {**WINDOW, "num_key_value_heads": 2}),
    "experts": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**WINDOW, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "state": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {**tiny.SMALL, "attention_hidden_size": 32, "context_length": 256},
    ),
    "state space": ("MambaForCausalLM", "MambaConfig", {**tiny.SMALL, "state_size": 8}),
    "mixed": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**tiny.ATTENTION, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    ),
    "decoder of two": ("BartForCausalLM", "BartConfig", tiny.ENCODER_DECODER),
    "positions by padding": (
        "RobertaForCausalLM",
        "RobertaConfig",
        {**tiny.ATTENTION, "is_decoder": True, "pad_token_id": 1},
    ),
}
OTHERS = {
    "permuted": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": 600, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    ),
    "masked": ("BertLMHeadModel", "BertConfig", tiny.ATTENTION),
}


def made(kind: str, config: str, options: dict) -> PaddedModel:
    return PaddedModel(tiny.random_model(kind, config, **options), tiny.tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_changes_no_score(family):
    model = made(*FAMILIES[family])
    texts = ["x", "the moon is round", "a b c d e f g " * 4]
    scorings = [
        plan_scoring(model.tokenize([f"{text} {c}" for c in ("yes", "no way", "maybe")]), model.eos)
        for text in texts
    ]
    together = model.score(scorings, 100_000)
    for scoring, scores in zip(scorings, together, strict=True):
        for ending, score in zip(scoring.endings, scores, strict=True):
            tokens = [*scoring.shared, *ending]
            with torch.inference_mode():
                logits = model.model(torch.tensor([tokens]), use_cache=False).logits[0].double()
            n = len(scoring.shared)
            logprobs = logits.log_softmax(-1)
            alone = sum(float(logprobs[i - 1, tokens[i]]) for i in range(n, len(tokens)))
            assert score == pytest.approx(alone, abs=2e-3, rel=1e-4)
    found = probe(model)
    assert found["later_tokens"] < 1e-4 and found["beside_others"] < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OTHERS)
def test_what_is_not_causal_is_refused(family, dtype):
    model = made(*OTHERS[family])
    model.model.to(dtype)
    with pytest.raises(ModelError, match=r"not a causal model .*later tokens change the logits"):
        probe(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype):
    model = made(*FAMILIES["experts"])
    model.model.to(dtype)
    probe(model)


def test_rows_that_see_their_batch_are_refused(monkeypatch):
    model = made(*FAMILIES["alibi"])
    forward = model.model.forward

    def mixing(input_ids, **options):
        found = forward(input_ids=input_ids, **options)
        found.logits[0] += found.logits.std(dim=0, correction=0)  # zero for a batch of one
        return found

    monkeypatch.setattr(model.model, "forward", mixing)
    with pytest.raises(ModelError, match="different results in a batch than alone"):
        probe(model)


def test_no_engine_computes_layers_that_choose_their_keys(monkeypatch):
    """They see all keys of a text as short as the probe's, and not those of a longer one."""
    model = PaddedModel(tiny.llama(), tiny.tokenizer())
    assert not probe(model)["unfit"]

    def mask(inputs_embeds, **_):
        return torch.ones(2 * inputs_embeds.shape[1:2], dtype=torch.bool).tril()[None, None]

    with monkeypatch.context() as patched:
        patched.setattr("transformers.models.llama.modeling_llama.create_causal_mask", mask)
        assert probe(model)["unfit"] == "its layers have masks of their own"
    attend = LlamaAttention.forward
    chosen = {"block_indices": torch.zeros(1)}
    monkeypatch.setattr(LlamaAttention, "forward", lambda *a, **k: attend(*a, **k, **chosen))
    assert "block_indices" in probe(model)["unfit"]


@pytest.mark.parametrize("options", [{"max_position_embeddings": 2}, {"vocab_size": 5}])
def test_models_that_take_little_are_probed_all_the_same(options):
    model = PaddedModel(tiny.llama(**options), tiny.tokenizer())
    assert probe(model)["later_tokens"] == 0


def raising(error):
    def call(*args):
        raise error

    return call


class TestRemembered:
    @pytest.fixture
    def probed(self, monkeypatch, tmp_path):
        """Models that were probed."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        found = []
        monkeypatch.setattr(
            "dask_pcm.inference.probe.probe", lambda model: found.append(model) or probe(model)
        )
        return found

    def test_what_passed_is_not_asked_again(self, probed, tmp_path, monkeypatch):
        folder = str(tiny.saved(tmp_path / "model", tiny.llama()))
        for _ in range(2):
            load_model(folder, device="cpu", content="a")
        assert len(probed) == 1
        load_model(folder, device="cpu", content="b")
        load_model(folder, device="cpu", content="a", dtype="bfloat16")
        assert len(probed) == 3
        monkeypatch.setattr("dask_pcm.inference.probe.device_model", lambda: "another")
        load_model(folder, device="cpu", content="a")
        assert len(probed) == 4

    def test_what_failed_is(self, probed, tmp_path):
        folder = str(
            tiny.saved(
                tmp_path / "model", tiny.random_model(*OTHERS["masked"][:2], **tiny.ATTENTION)
            )
        )
        for _ in range(2):
            with pytest.raises(ModelError, match="not a causal model"):
                load_model(folder, device="cpu", content="a")
        assert len(probed) == 2

    def test_that_no_engine_computes_it_is_asked_again(self, probed, tmp_path, monkeypatch):
        """It may have been for memory."""
        folder = str(tiny.saved(tmp_path / "model", tiny.llama()))
        full = torch.OutOfMemoryError("CUDA out of memory")
        with monkeypatch.context() as patched:
            patched.setattr("dask_pcm.inference.probe.packed_logits", raising(full))
            assert not load_model(folder, device="cpu", content="a").is_attended
        assert load_model(folder, device="cpu", content="a").is_attended
        assert len(probed) == 2

    def test_a_device_that_is_lost_meanwhile_is_no_property_of_the_model(
        self, tmp_path, monkeypatch
    ):
        lost = RuntimeError("CUDA error: device-side assert triggered")
        monkeypatch.setattr("dask_pcm.inference.probe.packed_logits", raising(lost))
        with pytest.raises(RuntimeError, match="device-side assert"):
            load_model(str(tiny.saved(tmp_path / "model", tiny.llama())), device="cpu")

    def test_a_model_is_probed_under_the_content_of_its_files(self, probed, monkeypatch):
        from dask_pcm.factcheck import demo_model
        from dask_pcm.ladder.build import recipe_of

        asked = []
        monkeypatch.setattr(loading, "ensure_exact", lambda model, content: asked.append(content))
        llm: LLM = demo_model()
        recipe_of(llm.ref).build({bundle.digest: llm.path for bundle in llm.ref.bundles})
        assert asked == [llm.ref.bundles[0].digest]

    @pytest.mark.timeout(300)
    def test_a_context_that_outlived_its_process_is_not_probed(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dask_pcm.inference.llm.misfits", lambda *given: [])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        noted = tmp_path / "cache" / "dask_pcm" / "probes"
        llm = LLM(tiny.saved(tmp_path / "model", tiny.llama()), device="cpu")
        with validated_cluster(n_workers=1) as cluster, Client(cluster) as client:
            pcm.install(client)
            pid = client.submit(process_of, llm).result(250)
            (note,) = noted.iterdir()
            note.unlink()
            os.kill(pid, signal.SIGKILL)
            assert client.submit(process_of, llm, pure=False).result(250) != pid
        assert not list(noted.iterdir())


def process_of(llm: LLM) -> int:
    with pcm.acquire(llm) as model:
        model.padded.tokenize(["the moon"])
        return os.getpid()
