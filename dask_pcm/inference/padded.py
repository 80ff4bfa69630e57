"""A transformers model on one device, run on padded batches: right for every causal one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dask_pcm.errors import ModelError
from dask_pcm.inference.checkpoint import Checkpoint
from dask_pcm.inference.model_folder import weight_files
from dask_pcm.inference.probe import ensure_exact
from dask_pcm.inference.prompts import Scoring, ScoringError, Text, batches_by_length
from dask_pcm.inference.tokens import Encoder
from dask_pcm.ladder.device import check_device, chosen_device

logger = logging.getLogger(__name__)

#: A tokenizer that knows no limit says a number like 10**30.
_NO_LIMIT = 10**9


def load_model(
    path: str, dtype: str = "auto", device: str | None = "auto", content: str | None = None
) -> PlainModel:
    """Load a model folder; the loader of ``LLM``, run on workers.

    Parameters
    ----------
    device
        Of torch, or "auto": the accelerator that the worker was given, and the CPU only where it
        was given none, or ``pcm.worker.accelerator`` says so.
    content
        Identity of the files, by which it is remembered that the model passed its probe.

    Raises
    ------
    DeviceUnusableError
        Where the worker was given a device that torch cannot use. "cpu" does without it.
    ModelError
        Where the weights do not fit the architecture, or the model fails its probe.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if device != "cpu":
        check_device()
    if device is None or device == "auto":
        device = chosen_device()
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    files = weight_files(Path(path))
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_safetensors = all(file.suffix == ".safetensors" for file in files)
    if device != "cpu" and kind is not None and is_safetensors:
        model = load_onto(path, kind, config, files, dtype, device)
    else:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        _check(found, path)
        model = model.to(device)
    model.requires_grad_(False)
    plain = PlainModel(model.eval(), tokenizer)
    ensure_exact(plain, content)
    return plain


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
    n_embeddings
        Tokens that it knows; a tokenizer may have more.
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
        self.n_embeddings = _n_embeddings(model)
        self._encoder = Encoder(tokenizer)
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def facts(self) -> dict[str, str]:
        """Where and how it runs, for the ledger."""
        return {"device": str(self.model.device), "dtype": str(self.model.dtype)}

    @property
    def eos(self) -> int | None:
        """The token that ends an answer."""
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    def tokenize(self, texts: Sequence[str | Text]) -> list[list[int]]:
        """Token ids of each text, with the model's own beginning but no ending.

        Control tokens that a text spells out are text, unless they are a template's own.
        """
        return self._encoder(texts)

    def check_tokens(self, scoring: Scoring) -> None:
        """Raise ScoringError where a token is none that the model knows."""
        last = max(max(scoring.shared), *map(max, scoring.endings))
        if last >= self.n_embeddings:
            (name,) = self.tokenizer.convert_ids_to_tokens([last])
            raise ScoringError(
                f"Token {name!r} has id {last}, and the model's embedding has {self.n_embeddings}"
                " rows: the tokenizer is larger than the model."
            )

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
            wanted = [
                (line, len(scorings[row].shared) - 1 + offset, token, row, choice)
                for line, (row, run) in enumerate(batch)
                for choice in _owned(scorings[row], run)
                for offset, token in enumerate(scorings[row].endings[choice])
            ]
            found = self._logprobs(sequences, [want[:3] for want in wanted])
            for value, (*_, row, choice) in zip(found, wanted, strict=True):
                scores[row][choice] += value
        return scores

    def logits(self, sequences: Sequence[Sequence[int]], positions: Sequence[int]) -> Any:
        """One forward; logits of shape (sequences, positions, tokens).

        Padded on the right, where a causal model's earlier logits see nothing of it: no mask and no
        position ids are needed, which many kinds of model handle in ways of their own, or not.

        Parameters
        ----------
        positions
            At which logits are wanted, in ascending order.
        """
        import torch

        n_tokens = max(map(len, sequences))
        # With its own last token: every model knows that one.
        padded = [[*tokens, *[tokens[-1]] * (n_tokens - len(tokens))] for tokens in sequences]
        ids = torch.tensor(padded, device=self.model.device)
        kept = torch.tensor(positions, device=self.model.device)
        options = {"logits_to_keep": kept} if self._keeps_some else {}
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=False, **options).logits
            return logits if self._keeps_some else logits[:, kept]

    def _logprobs(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int, int]]
    ) -> list[float]:
        """One forward; log P of each wanted (sequence, position, token)."""
        import torch

        positions = sorted({position for _, position, _ in wanted})
        column = {position: at for at, position in enumerate(positions)}
        logits = self.logits(sequences, positions)
        at = [(line, column[position], token) for line, position, token in wanted]
        line, position, token = torch.tensor(at, device=logits.device).unbind(1)
        with torch.inference_mode():
            kept = torch.log_softmax(logits[line, position].float(), dim=-1)
            return kept.gather(1, token[:, None])[:, 0].tolist()


def _n_embeddings(model: Any) -> int:
    """Tokens that can be put in and scored."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(layer.weight) for layer in layers if layer is not None)


def _owned(scoring: Scoring, run: Sequence[int]) -> list[int]:
    """Choices that are scored on `run`: the first of the runs that shows all before their end."""
    return [
        choice
        for choice, ending in enumerate(scoring.endings)
        if next(r for r in scoring.runs if r[: len(ending) - 1] == ending[:-1]) == run
    ]
