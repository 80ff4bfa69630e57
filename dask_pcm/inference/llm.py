"""``LLM``: a language model as a context, resolved on the client."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from dask_pcm.bundles import bundle_of
from dask_pcm.context import Context
from dask_pcm.errors import ModelError
from dask_pcm.inference.plain import load_model

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
#: How classes of models that continue a text are called.
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class LLM(Context):
    """A context whose live object can score answers.

    Parameters
    ----------
    model
        A folder with a transformers model, or the id of one on the Hugging Face hub. An id is
        resolved here, on the client, to a commit; workers read the files and never ask a hub.
    revision
        Branch, tag or commit of a hub model.
    dtype
        Of the weights: "auto" (as stored), or "float32", "bfloat16", "float16".
    device
        "auto" takes the accelerator that the worker was given, and the CPU only where it was given
        none, or ``pcm.worker.accelerator`` is "cpu": one that torch cannot use is an error. "cpu"
        asks for the CPU everywhere. None is "auto".
    name, device_memory
        As for ``Context``; by default the size of the weights, and nothing on the CPU.

    Raises
    ------
    ModelError
        Where the folder is missing, incomplete or corrupt, or the id cannot be resolved.

    Notes
    -----
    The identity is the content of the files: the same files elsewhere are the same context. Each
    is read once for it, and remembered. Workers stage them (see ``Context``). Tokens for private
    hub models are used on the client alone and go nowhere else.
    """

    __slots__ = ("commit", "path")
    path: str
    commit: str

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = "auto",
        name: str | None = None,
        device_memory: int | str | None = None,
    ) -> None:
        if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
            raise ModelError(f"LLM needs a model folder or a hub id; found {model!r}.")
        if dtype not in _DTYPES:
            raise ModelError(f"dtype must be one of {', '.join(_DTYPES)}; found {dtype!r}.")
        path, commit = _resolve(os.fspath(model), revision)
        _check_folder(path)
        has_safetensors = any(path.glob("*.safetensors"))
        files = bundle_of(path, _PATTERNS if has_safetensors else (*_PATTERNS, "*.bin"))
        name = name or Path(os.fspath(model)).name
        is_on_device = device != "cpu"
        memory = _weight_bytes(path) if device_memory is None and is_on_device else device_memory
        super().__init__(
            load_model,
            str(path),
            files=[files],
            dtype=dtype,
            device=device or "auto",
            name=name,
            device_memory=memory,
        )
        commit = commit or files.digest
        about = (("model", os.fspath(model)), ("commit", commit))
        object.__setattr__(self, "ref", replace(self.ref, about=about))
        object.__setattr__(self, "path", str(path))
        object.__setattr__(self, "commit", commit)


def _resolve(model: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a model, and its commit; empty where it is nobody's but a folder."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(
                f"{model!r} is a folder and has no revisions; found revision={revision!r}."
            )
        return path.resolve(), ""
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"There is no model folder {model!r}. Give a folder with config.json, tokenizer and"
            " weights, or a hub id with its owner, such as 'HuggingFaceTB/SmolLM2-1.7B-Instruct' or"
            " 'openai-community/gpt2'."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(_PATTERNS)))
    except Exception as error:
        raise ModelError(
            f"{model!r} is no folder here, and could not be resolved on the hub either"
            f" ({type(error).__name__}: {error})."
        ) from error
    return folder, folder.name  # snapshots are named by their commit


def _check_folder(path: Path) -> None:
    config = path / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{str(path)!r} is no model folder: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(config)!r} cannot be read: {error}.") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise ModelError(f"{str(config)!r} names no model_type.")
    _check_architecture(config, found)
    _check_tokenizer(path)
    _check_weights(path)


def _check_architecture(config: Path, found: dict[str, Any]) -> None:
    """Whether transformers knows the type of model, and it is a causal one."""
    kind, architectures = str(found["model_type"]), found.get("architectures") or []
    if not _is_known(kind):
        raise ModelError(
            f"{str(config)!r} says model_type {kind!r}, which transformers does not know here."
        )
    if architectures and not any(str(name).endswith(_CAUSAL) for name in architectures):
        raise ModelError(f"{str(config)!r} is of {architectures[0]}, which is no causal model.")


def _is_known(model_type: str) -> bool:
    # Most types have a folder of their name; to ask transformers itself is to import torch.
    spec = importlib.util.find_spec("transformers")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "models" / model_type.replace("-", "_")
        if folder.is_dir():
            return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _check_tokenizer(path: Path) -> None:
    file = path / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise ModelError(f"{str(file)!r} is corrupt: {error}.") from error
    elif not any(path.glob("*.model")) and not any(path.glob("vocab*")):
        raise ModelError(
            f"{str(path)!r} has no tokenizer files (tokenizer.json, *.model or vocab.*)."
        )


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{str(index)!r} is corrupt: {type(error).__name__}: {error}."
            ) from error
        if missing := [shard for shard in shards if not (path / shard).exists()]:
            raise ModelError(f"{str(path)!r} lacks {missing[0]!r}, which its index names.")
    files = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    if not files:
        raise ModelError(f"{str(path)!r} has no weights ({', '.join(_WEIGHTS)}).")
    for file in path.glob("*.safetensors"):
        if problem := _safetensors_problem(file):
            raise ModelError(f"{str(file)!r} is corrupt: {problem}. Copy or download it again.")


def _safetensors_problem(file: Path) -> str | None:
    """What is wrong with a safetensors file, from its header and size; the format is

    eight bytes of header length, a JSON header with ``data_offsets``, then the data.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
        if size < 8 or n_header > size - 8:
            return f"its header should have {n_header} bytes, the file has {size}"
        try:
            header = json.loads(stream.read(n_header))
            ends = [e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its header is not readable"
    expected = 8 + n_header + max(ends, default=0)
    return None if size == expected else f"it should have {expected} bytes and has {size}"


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for pattern in _WEIGHTS for file in path.glob(pattern))
