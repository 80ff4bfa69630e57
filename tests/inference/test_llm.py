from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dask_pcm import LLM
from dask_pcm.errors import ModelError
from dask_pcm.factcheck.demo import MODEL_PATH


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(MODEL_PATH, tmp_path / "model"))


def test_the_identity_is_the_content_of_the_files(folder, tmp_path):
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert LLM(folder) == LLM(elsewhere, name="x", device_memory=5) == LLM(MODEL_PATH)
    assert LLM(folder) != LLM(folder, dtype="bfloat16")
    config = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert LLM(folder) != LLM(elsewhere)


def test_it_says_what_it_takes(folder):
    llm = LLM(folder)
    assert llm.name == "model"
    assert llm.device_memory_bytes == (folder / "model.safetensors").stat().st_size
    assert len(llm.commit) == 32


def test_a_hub_id_is_resolved_to_its_commit(folder, tmp_path, monkeypatch):
    """Against a cache as the hub's client lays it out; the network is not asked."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    code = f"""
import os
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE={str(tmp_path / "hub")!r}, HF_TOKEN="hf_secret")
from dask_pcm import LLM
import pickle
llm = LLM("org/tiny")
assert b"hf_secret" not in pickle.dumps(llm)
print(llm.commit, llm.path, llm.digest)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    resolved, path, digest = found.stdout.split()
    assert resolved == commit
    assert path == str(cache / "snapshots" / commit)
    assert len(digest) == 32


class TestRefusedAtOnce:
    def test_nothing_there(self):
        with pytest.raises(ModelError, match=r"no model folder '\./nowhere'.*hub id"):
            LLM("./nowhere")

    def test_a_hub_id_that_cannot_be_resolved(self, monkeypatch):
        import huggingface_hub

        def refuse(*args, **kwargs):
            raise ConnectionError("no network")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(ModelError, match=r"'org/none' is not a local folder.*no network"):
            LLM("org/none")

    def test_a_revision_of_a_folder(self, folder):
        with pytest.raises(ModelError, match="has no revisions"):
            LLM(folder, revision="main")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("config.json", "no config.json"),
            ("model.safetensors", "has no weights"),
            ("tokenizer.json", "no tokenizer files"),
        ],
    )
    def test_files_that_are_missing(self, folder, name, message):
        for file in folder.glob(name):
            file.unlink()
        with pytest.raises(ModelError, match=message):
            LLM(folder)

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-100], lambda b: b + b"x", lambda b: b"\xff" * 99]
    )
    def test_weights_that_are_corrupt(self, folder, damage):
        file = folder / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ModelError, match=r"model\.safetensors' is corrupt.*again"):
            LLM(folder)

    def test_a_config_that_is_corrupt(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(ModelError, match=r"config\.json' cannot be read"):
            LLM(folder)
        (folder / "config.json").write_text("{}")
        with pytest.raises(ModelError, match="names no model_type"):
            LLM(folder)

    @pytest.mark.parametrize("text", ["garbage", "{}"])
    def test_a_tokenizer_or_an_index_that_is_corrupt(self, folder, text):
        index = folder / "model.safetensors.index.json"
        index.write_text(text)
        with pytest.raises(ModelError, match=r"index\.json' is corrupt"):
            LLM(folder)
        index.unlink()
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match=r"tokenizer\.json' is corrupt"):
            LLM(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"model_type": "llama-of-mars"},
                "'llama-of-mars', which the installed transformers does not",
            ),
            (
                {"architectures": ["BertForMaskedLM"]},
                "BertForMaskedLM, which is not a causal model",
            ),
        ],
    )
    def test_an_architecture_that_is_no_causal_model(self, folder, change, message):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            LLM(folder)

    def test_weights_that_are_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        (folder / "training_args.bin").write_bytes(b"x")
        with pytest.raises(ModelError, match="has no weights"):
            LLM(folder)

    def test_arguments_that_make_no_sense(self, folder):
        with pytest.raises(ModelError, match="dtype must be one of"):
            LLM(folder, dtype="float33")
        for nothing in ("", None):
            with pytest.raises(ModelError, match="needs a model folder"):
                LLM(nothing)

    def test_a_shard_that_is_missing(self, folder):
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"lacks 'model-00001-of-00002\.safetensors'"):
            LLM(folder)
