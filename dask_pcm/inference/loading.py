"""A worker loads a model folder onto its device, and probes the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dask_pcm.errors import ModelError
from dask_pcm.inference.checkpoint import Checkpoint, options_of
from dask_pcm.inference.engine.attention import switch_back
from dask_pcm.inference.language_model import LanguageModel
from dask_pcm.inference.model_folder import weight_files
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.probe import ensure_exact
from dask_pcm.ladder.device import check_device, chosen_device


def load_model(
    path: str,
    dtype: str = "auto",
    device: str | None = "auto",
    content: str | None = None,
    is_encoder: bool = False,
    runs_code: bool = False,
    deterministic: bool = False,
) -> LanguageModel:
    """Load a model folder on a worker; the loader of ``LLM``.

    Parameters
    ----------
    path
        The model folder.
    dtype
        Dtype of the weights; "auto" as stored.
    device
        A torch device, or "auto" (or None) for the accelerator assigned to the worker; the CPU if
        none is assigned or ``pcm.worker.accelerator`` is "cpu".
    content
        Digest of the files. With it, the result of the probe is cached.
    is_encoder
        Whether its tokens see those after them; then it only embeds texts.
    runs_code
        Whether the model's classes are those in the folder.
    deterministic
        Whether forwards have fixed shapes; see ``LLM``.

    Raises
    ------
    DeviceUnusableError
        If torch cannot use the device assigned to the worker. Never raised for "cpu".
    ModelError
        If the weights do not fit the architecture, or the model fails its probe.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    how = {"local_files_only": True, "trust_remote_code": runs_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **how)
    if device != "cpu":
        check_device()
    if device is None or device == "auto":
        device = chosen_device()
    config = transformers.AutoConfig.from_pretrained(path, **how)
    files = weight_files(Path(path))
    mapping = transformers.MODEL_MAPPING if is_encoder else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = mapping.get(type(config), None)
    is_safetensors = all(file.suffix == ".safetensors" for file in files)
    options = options_of(kind) if is_encoder and kind is not None else {}
    if device != "cpu" and kind is not None and is_safetensors:
        model = load_onto(path, kind, config, files, dtype, device, options)
    else:
        auto = transformers.AutoModel if is_encoder else transformers.AutoModelForCausalLM
        model, found = auto.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **how, **options
        )
        _check(found, path)
        model = model.to(device)
    model.requires_grad_(False)
    padded = PaddedModel(
        model.eval(),
        tokenizer,
        is_causal=not is_encoder,
        is_deterministic=deterministic,
        folder=path,
    )
    is_attended = ensure_exact(padded, content) and not deterministic
    if not is_attended:
        switch_back(model)
    return LanguageModel(padded, is_attended=is_attended, content=content)


def load_onto(
    path: str,
    kind: Any,
    config: Any,
    files: Sequence[Path],
    dtype: str,
    device: str,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Load a model whose weights are read from its files directly into device memory.

    Parameters
    ----------
    path
        The model folder.
    kind
        The model's class in transformers.
    config
        Its configuration object.
    files
        Its safetensors files.
    options
        Further keywords of its class.
    """
    import transformers

    with Checkpoint(files) as checkpoint:
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(checkpoint.tensors),
            dtype=dtype,
            output_loading_info=True,
            **(options or {}),
        )
        _check(found, path)
        checkpoint.place(model, device)
    if (Path(path) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _check(found: Mapping[str, Any], path: str) -> None:
    """Raise ModelError if transformers reports missing or mismatched weights."""
    if found["missing_keys"] or found["mismatched_keys"]:
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        raise ModelError(f"Weights of {path!r} are missing or do not fit: {wrong[:3]}.")
