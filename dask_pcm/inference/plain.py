"""A transformers model on one device, run on padded batches: right for every architecture."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dask_pcm.errors import ModelError
from dask_pcm.inference.prompts import Scoring, batches_by_length
from dask_pcm.ladder.checkpoint import Checkpoint
from dask_pcm.ladder.device import check_device, chosen_device

logger = logging.getLogger(__name__)

#: A tokenizer that knows no limit says a number like 10**30.
_NO_LIMIT = 10**9


def load_model(path: str, dtype: str = "auto", device: str | None = "auto") -> PlainModel:
    """Load a model folder; the loader of ``LLM``, run on workers.

    Parameters
    ----------
    device
        Of torch, or "auto": the accelerator that the worker was given, and the CPU only where it
        was given none, or ``pcm.worker.accelerator`` says so.

    Raises
    ------
    DeviceUnusableError
        Where the worker was given a device that torch cannot use. "cpu" does without it.
    ModelError
        Where the weights do not fit the architecture.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if device != "cpu":
        check_device()
    if device is None or device == "auto":
        device = chosen_device()
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    files = _weight_files(Path(path))
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    is_as_stored = files and kind and getattr(config, "quantization_config", None) is None
    if device != "cpu" and is_as_stored:
        model = load_onto(path, kind, config, files, dtype, device)
    else:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        _check(found, path)
        model = model.to(device)
    model.requires_grad_(False)
    return PlainModel(model.eval(), tokenizer)


def load_onto(
    path: str, kind: Any, config: Any, files: Sequence[Path], dtype: str, device: str
) -> Any:
    """A model whose weights are read from their files straight into a device's memory.

    Parameters
    ----------
    kind
        The class of the model, of transformers.
    """
    import transformers

    with Checkpoint(files) as checkpoint:
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(checkpoint.tensors),
            dtype=dtype,
            output_loading_info=True,
        )
        _check(found, path)
        checkpoint.place(model, device)
    if (Path(path) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _weight_files(path: Path) -> list[Path]:
    """Safetensors files with all the weights of a model folder; none where it has no such."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    single = path / "model.safetensors"
    return [single] if single.exists() else []


def _check(found: Mapping[str, Any], path: str) -> None:
    if found["missing_keys"] or found["mismatched_keys"]:
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        raise ModelError(f"Weights of {path!r} are missing or do not fit: {wrong[:3]}.")


class PlainModel:
    """A causal language model and its tokenizer.

    Attributes
    ----------
    max_tokens
        The longest sequence it takes; None where neither model nor tokenizer says.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        limits = [getattr(config, name, None) for name in names]
        limits.append(getattr(tokenizer, "model_max_length", None))
        known = [limit for limit in limits if limit and 0 < limit < _NO_LIMIT]
        self.max_tokens: int | None = min(known) if known else None
        forward = inspect.signature(model.forward).parameters
        self._has_positions = "position_ids" in forward
        self._keeps_last = "logits_to_keep" in forward

    @property
    def facts(self) -> dict[str, str]:
        """Where and how it runs, for the ledger."""
        return {"device": str(self.model.device), "dtype": str(self.model.dtype)}

    @property
    def eos(self) -> int | None:
        """The token that ends an answer."""
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the model's own beginning but no ending."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        eos = self.eos
        # Some tokenizers append an end of text: an answer could not follow it.
        return [row[:-1] if len(row) > 1 and row[-1] == eos else row for row in ids]

    def score(self, scorings: Sequence[Scoring], batch_tokens: int) -> list[list[float]]:
        """Log-probability of every choice of every row.

        Parameters
        ----------
        scorings
            What to run, by row.
        batch_tokens
            Padded tokens in one forward.

        Returns
        -------
        list of list of float
            By row and choice, the sum of log P(token | all before it) over the choice's tokens.
        """
        runs = [(row, run) for row, s in enumerate(scorings) for run in s.runs]
        lengths = [len(scorings[row].shared) + len(run) for row, run in runs]
        scores = [[0.0] * len(s.endings) for s in scorings]
        for group in batches_by_length(lengths, batch_tokens):
            batch = [runs[position] for position in group]
            sequences = [scorings[row].shared + run for row, run in batch]
            n_last = max(len(run) for _, run in batch) + 1
            wanted = [
                (line, n_last - 1 - len(run) + offset, token, row, choice)
                for line, (row, run) in enumerate(batch)
                for choice in _owned(scorings[row], run)
                for offset, token in enumerate(scorings[row].endings[choice])
            ]
            found = self._logprobs(sequences, n_last, [want[:3] for want in wanted])
            for value, (*_, row, choice) in zip(found, wanted, strict=True):
                scores[row][choice] += value
        return scores

    def _logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        n_last: int,
        wanted: Sequence[tuple[int, int, int]],
    ) -> list[float]:
        """One forward; log P of each wanted (sequence, position among the last, token)."""
        import torch

        n_tokens = max(map(len, sequences))
        ids = torch.zeros(len(sequences), n_tokens, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):  # padded on the left: endings are aligned
            ids[row, n_tokens - len(sequence) :] = torch.tensor(sequence)
            mask[row, n_tokens - len(sequence) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._has_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        options = {"logits_to_keep": n_last} if self._keeps_last else {}
        with torch.inference_mode():
            logits = self.model(**inputs, use_cache=False, **options).logits[:, -n_last:]
            line, position, token = torch.tensor(wanted, device=logits.device).unbind(1)
            kept = torch.log_softmax(logits[line, position].float(), dim=-1)
            return kept.gather(1, token[:, None])[:, 0].tolist()


def _owned(scoring: Scoring, run: Sequence[int]) -> list[int]:
    """Choices that are scored on `run`: the first of the runs that shows all before their end."""
    return [
        choice
        for choice, ending in enumerate(scoring.endings)
        if next(r for r in scoring.runs if r[: len(ending) - 1] == ending[:-1]) == run
    ]
