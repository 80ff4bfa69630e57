"""Folders that LLM refuses on the client, and odd ones that it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dask_pcm as pcm
from dask_pcm import LLM
from dask_pcm.errors import ModelError
from dask_pcm.inference import fit
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.model_folder import check_folder
from tests.support import models as tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("model") / "llama", tiny.llama())


@pytest.fixture(autouse=True)
def in_one_thread(monkeypatch):
    """As in the process that is asked of tensors."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def as_bin(folder: Path, n_files: int = 1, **options) -> list[Path]:
    """The weights in files of torch instead."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if n_files == 1:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return [folder / "pytorch_model.bin"]
    names = [f"pytorch_model-{number}.bin" for number in range(n_files)]
    of = {tensor: names[at % n_files] for at, tensor in enumerate(weights)}
    for name in names:
        torch.save({n: t for n, t in weights.items() if of[n] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": of})
    )
    return [folder / name for name in names]


def in_shards(folder: Path, index: bool = True) -> dict[str, str]:
    """The weights in two safetensors files; returns the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    of = {tensor: names[at % 2] for at, tensor in enumerate(weights)}
    for name in names:
        chosen = {n: t for n, t in weights.items() if of[n] == name}
        save_file(chosen, folder / name, metadata={"format": "pt"})
    if index:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": of})
        )
    return of


KINDS = {
    "seq2seq": ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "seq2seq"),
    "seq2seq of a type with decoders": (
        {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
        r"encoder-decoder.*BartForCausalLM",
    ),
    "its base": ({"model_type": "bart", "architectures": ["BartModel"]}, "encoder-decoder"),
    "seq2seq without a name": ({"model_type": "mbart", "architectures": None}, "encoder-decoder"),
    "images": (
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
        "images and text",
    ),
    "images of a type with texts": (
        {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]},
        r"images and text.*Llama4ForCausalLM",
    ),
    "images alone": ({"model_type": "vit", "architectures": ["ViTModel"]}, "not a causal model"),
    "speech": (
        {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
        "speech|encoder-decoder",
    ),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier"),
    "rewards": (
        {"architectures": ["LlamaForRewards"]},
        "of LlamaForRewards, which is not a causal",
    ),
    "pairs": (
        {"model_type": "bert", "architectures": ["BertForNextSentencePrediction"]},
        "not a causal model.*or an encoder",
    ),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
    "quantised in part": (
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        r"quantised \(fp8\)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds(folder, kind):
    change, message = KINDS[kind]
    edit(folder, **change)
    with pytest.raises(ModelError, match=message):
        LLM(folder)


@pytest.mark.parametrize(
    "architectures", [None, [], ["LlamaModel"], ["LLaMAForCausalLM"], ["LlamaForCausalLM"]]
)
def test_names_that_models_that_continue_texts_have(folder, architectures):
    edit(folder, architectures=architectures)
    assert [file.name for file in check_folder(folder)] == ["model.safetensors"]


def cut(file: Path, n_bytes: int) -> None:
    os.truncate(file, n_bytes)


def without_shard(folder: Path) -> None:
    as_bin(folder, 2)[1].unlink()


def with_a_lying_index(folder: Path) -> None:
    of = in_shards(folder)
    name = "model.safetensors.index.json"
    of["model.layers.9.mlp.up_proj.weight"] = min(of.values())
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": of}))


WRONG = {
    "a shard of torch's is missing": (without_shard, r"lacks 'pytorch_model-1\.bin'"),
    "a file of torch's is cut off": (
        lambda f: cut(*as_bin(f), 1000),
        r"bin' is corrupt.*truncated",
    ),
    "its last byte is missing": (
        lambda f: cut((b := as_bin(f)[0]), b.stat().st_size - 1),
        r"bin' is corrupt",
    ),
    "a shard of torch's is cut off": (lambda f: cut(as_bin(f, 2)[1], 500), r"-1\.bin' is corrupt"),
    "a file of torch's is another": (
        lambda f: as_bin(f)[0].write_bytes(b"version https://git-lfs"),
        "not a torch file",
    ),
    "shards without an index": (
        lambda f: in_shards(f, index=False),
        r"has no weights.*found model-00001-of-00002\.safetensors",
    ),
    "the index names what is not there": (with_a_lying_index, r"lacks 'model\.layers\.9"),
    "another format": (
        lambda f: (f / "model.safetensors").rename(f / "model.gguf"),
        r"has no weights.*found model\.gguf",
    ),
    "an adapter alone": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "only an adapter.*Merge",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_folders_that_are_incomplete_or_torn(folder, kind):
    damage, message = WRONG[kind]
    damage(folder)
    with pytest.raises(ModelError, match=message):
        LLM(folder)


def shards_of_safetensors(folder: Path) -> None:
    in_shards(folder)


def with_others_beside(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "optimizer.bin").write_bytes(b"x" * 1000)


ODD = {
    "as it was saved": lambda f: None,
    "torch's": as_bin,
    "torch's of old": lambda f: as_bin(f, _use_new_zipfile_serialization=False),
    "torch's in shards": lambda f: as_bin(f, 3),
    "in shards": shards_of_safetensors,
    "others beside": with_others_beside,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_folders_are_the_same_model(original, folder, kind):
    ODD[kind](folder)
    files = check_folder(folder)
    assert fit.problems(str(folder), [str(file) for file in files]) == []
    expected = load_model(str(original), device="cpu").padded.logits([[5, 6, 7]], [0, 2])
    assert torch.equal(
        load_model(str(folder), device="cpu").padded.logits([[5, 6, 7]], [0, 2]), expected
    )


def test_what_lies_beside_weights_is_neither_staged_nor_counted(folder, monkeypatch):
    monkeypatch.setattr("dask_pcm.inference.llm.misfits", lambda *given: [])
    with_others_beside(folder)
    llm = LLM(folder)
    assert llm.device_memory_bytes == (folder / "model.safetensors").stat().st_size
    assert not {"consolidated.safetensors", "optimizer.bin"} & {
        file.name for file in llm.ref.bundles[0].files
    }


class TestTensors:
    """What only transformers can tell, which a process of its own asks."""

    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @pytest.mark.timeout(300)
    def test_a_missing_one_and_another_shape_are_named_and_torch_is_not_imported(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.norm.weight"] = torch.ones(7)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        code = f"""
import sys
import dask_pcm as pcm
from dask_pcm import LLM
try:
    LLM({str(folder)!r})
except Exception as error:
    print(type(error).__name__, error)
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
        command = [sys.executable, "-c", code]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert told.startswith("ModelError The weights in")
        assert "lm_head.weight is missing; model.layers.1.mlp.up_proj.weight is missing" in told
        assert "model.norm.weight has shape [7], and config.json makes it [32]" in told

    @pytest.mark.parametrize("is_tied", [True, False])
    def test_a_tied_one_need_not_be_there(self, folder, is_tied):
        edit(folder, tie_word_embeddings=is_tied)
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found = fit.problems(str(folder), [str(folder / "model.safetensors")])
        assert found == ([] if is_tied else ["lm_head.weight is missing"])

    def test_what_was_found_is_remembered(self, folder, monkeypatch):
        asked = []
        monkeypatch.setattr(fit, "_asked", lambda *given: asked.append(given) or ["x is missing"])
        for _ in range(2):
            with pytest.raises(ModelError, match="x is missing"):
                LLM(folder)
        assert len(asked) == 1

    def test_where_nothing_can_be_found_out_workers_will_say(self, folder, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/nowhere")
        assert LLM(folder).name == "model"


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd_llama"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **options):
        found = super().forward(*args, **options)
        found.logits = -found.logits
        return found
"""


class TestCode:
    @pytest.fixture
    def odd(self, folder):
        """A model whose class is in its folder."""
        (folder / "modeling_odd.py").write_text(CODE)
        names = {"AutoConfig": "modeling_odd.OddConfig"}
        names["AutoModelForCausalLM"] = "modeling_odd.OddForCausalLM"
        edit(folder, model_type="odd_llama", architectures=["OddForCausalLM"], auto_map=names)
        return folder

    def test_is_not_run_unless_it_is_trusted(self, odd):
        with pytest.raises(ModelError, match=r"only by the code in that .*trust_remote_code=True"):
            LLM(odd)

    def test_is_run_where_it_is_trusted(self, odd, folder, client):
        llm = LLM(odd, trust_remote_code=True, device="cpu")
        ids = [[5, 6, 7]]
        found = client.submit(logits_of, llm, ids).result(120)
        edit(odd, model_type="llama", auto_map={}, architectures=["LlamaForCausalLM"])
        plain = load_model(str(odd), device="cpu").padded.logits(ids, [0, 2])
        assert np.allclose(found, -plain.numpy(), atol=1e-5)

    def test_that_is_missing_is_told(self, odd):
        (odd / "modeling_odd.py").unlink()
        with pytest.raises(ModelError, match="needs code that is not in it: modeling_odd"):
            LLM(odd, trust_remote_code=True)

    def test_of_a_model_that_transformers_knows_is_not_needed(self, folder):
        edit(folder, auto_map={"AutoModelForCausalLM": "other--modeling.Model"})
        assert LLM(folder).ref == LLM(folder, trust_remote_code=True).ref


def logits_of(llm, ids):
    with pcm.acquire(llm) as model:
        return model.padded.logits(ids, [0, 2]).numpy()
