"""``LLM``: a language model as a context, resolved on the client."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dask_pcm.context.bundles import bundle_of
from dask_pcm.context.context import Context
from dask_pcm.errors import ModelError
from dask_pcm.inference.fit import misfits
from dask_pcm.inference.model_folder import PATTERNS, check_folder
from dask_pcm.inference.padded import load_model

#: What is asked of a hub.
_PATTERNS = (*PATTERNS, "*.safetensors")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        Where the folder is missing, incomplete, corrupt or quantised, the model is not one that
        continues texts, or the id cannot be resolved.

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
        weights = check_folder(path)
        files = bundle_of(path, (*PATTERNS, *(file.name for file in weights)))
        if wrong := misfits(path, weights, files.digest):
            raise ModelError(
                f"The weights in {str(path)!r} are not those of its config.json:"
                f" {'; '.join(wrong)}. Copy or download the folder again."
            )
        name = name or Path(os.fspath(model)).name
        is_on_device = device != "cpu"
        memory = _bytes_of(weights) if device_memory is None and is_on_device else device_memory
        super().__init__(
            load_model,
            str(path),
            files=[files],
            dtype=dtype,
            device=device or "auto",
            content=files.digest,
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


def _bytes_of(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)
