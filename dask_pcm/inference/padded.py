"""Any transformers model can be computed in padded batches, on one device.

Batches are padded on the right. A causal model's logits do not depend on later tokens, so no
attention mask is needed; encoders get one. ``probe`` verifies both when a model is loaded.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from dask_pcm.inference.engine.rows import NOT_A_NUMBER, Pooling, RowError
from dask_pcm.inference.prompts import Scoring, ScoringError, Text
from dask_pcm.inference.shapes import Shapes
from dask_pcm.inference.tokens import Encoder

#: Tokenizers without a limit report a number such as 10**30.
_NO_LIMIT = 10**9
#: Forwards of this process in padded batches: two at a time would take twice the memory.
_one_at_a_time = threading.RLock()


def in_turn() -> AbstractContextManager[Any]:
    """Within the block, no other thread computes padded batches."""
    return _one_at_a_time


class PaddedModel:
    """A causal language model, or an encoder, and its tokenizer.

    Attributes
    ----------
    is_causal
        False for encoders, which only embed texts.
    folder
        Where its files are.
    first_position
        The position of a text's first token, as the model counts them.
    max_tokens
        Context length in tokens; None if neither model nor tokenizer states one.
    n_embeddings
        Vocabulary size of the model; a tokenizer may have more tokens.
    shapes
        The shapes of its forwards.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        is_causal: bool = True,
        is_deterministic: bool = False,
        folder: str = "",
    ) -> None:
        self.model = model
        self.folder = folder
        self.is_causal = is_causal
        self.first_position = _first_position(model)
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        limits = [getattr(config, name, None) for name in names]
        limits.append(getattr(tokenizer, "model_max_length", None))
        known = [limit for limit in limits if limit and 0 < limit < _NO_LIMIT]
        self.max_tokens: int | None = min(known) - self.first_position if known else None
        self.shapes = Shapes(config, self.max_tokens, is_deterministic)
        self.n_embeddings = _n_embeddings(model)
        #: Whether rows may be continued together; None until that is known (``padded_generate``).
        self.continues_batches: bool | None = None
        self._encoder = Encoder(tokenizer)
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def facts(self) -> dict[str, str]:
        """Device and dtype, recorded in the ledger."""
        return {"device": str(self.model.device), "dtype": str(self.model.dtype)}

    @property
    def eos(self) -> int | None:
        """Id of the end-of-text token; None if the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    def tokenize(self, texts: Sequence[str | Text], *, keeps_end: bool = False) -> list[list[int]]:
        """Token ids of each text, with a beginning-of-text token.

        Control tokens spelled out in a text are plain text, except in a template's own parts.

        Parameters
        ----------
        keeps_end
            Whether an end-of-text token that the tokenizer adds is kept, after which no answer can
            follow.
        """
        return self._encoder(texts, keeps_end=keeps_end)

    @property
    def stops(self) -> frozenset[int]:
        """Ids of the tokens that end a text."""
        found: set[Any] = set()
        for one in (self.tokenizer, self.model.config, self.model.generation_config):
            ids = getattr(one, "eos_token_id", None)
            found |= {*ids} if isinstance(ids, (list, tuple)) else {ids}
        return frozenset(int(one) for one in found if one is not None)

    def stops_of(self, texts: Sequence[str]) -> frozenset[int]:
        """Ids of the tokens that end a text, with those of control tokens among `texts`.

        Decoded texts have no control tokens, so they are found by their ids.
        """
        ids = self._encoder.control_ids
        return self.stops | {ids[text] for text in texts if text in ids}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def check_tokens(self, plan: Scoring | Sequence[int]) -> None:
        """Raise ScoringError if a token is not in the model's vocabulary."""
        last = (
            max(max(plan.shared), *map(max, plan.endings))
            if isinstance(plan, Scoring)
            else max(plan)
        )
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
            One per row.
        batch_tokens
            Maximum number of tokens in a forward pass, padding included.

        Returns
        -------
        list of list of float
            Shape (rows, choices): the sum over a choice's tokens of log P(token | all tokens
            before it).
        """
        with _one_at_a_time:
            return self._scores(scorings, batch_tokens)

    def _scores(self, scorings: Sequence[Scoring], batch_tokens: int) -> list[list[float]]:
        runs = [(row, run) for row, s in enumerate(scorings) for run in s.runs]
        lengths = [len(scorings[row].shared) + len(run) for row, run in runs]
        scores = [[0.0] * len(s.endings) for s in scorings]
        for group in self.shapes.batches(lengths, batch_tokens):
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

    def embed(
        self, texts: Sequence[Sequence[int]], pooling: Pooling, batch_tokens: int
    ) -> list[Any]:
        """The pooled hidden states of each text, shape (width,), float32.

        Parameters
        ----------
        texts
            Token ids of each.
        batch_tokens
            Tokens of a batch at most, padding included.
        """
        found: list[Any] = [None] * len(texts)
        with _one_at_a_time:
            for group in self.shapes.batches([len(text) for text in texts], batch_tokens):
                hidden = self.hidden([texts[k] for k in group])
                for line, k in enumerate(group):
                    kept = pooling.kept(len(texts[k]))
                    vector = hidden[line, kept.start : kept.stop].mean(0).cpu().numpy()
                    found[k] = RowError(NOT_A_NUMBER) if np.isnan(vector).any() else vector
        return found

    def hidden(self, sequences: Sequence[Sequence[int]]) -> Any:
        """The last hidden states of a forward, shape (sequences, tokens, width), float32.

        Sequences are padded on the right; what padding has is of no meaning.
        """
        import torch

        ids = torch.tensor(self.shapes.padded(sequences), device=self.model.device)
        options: dict[str, Any] = {"use_cache": False}
        if not self.is_causal:
            lengths = torch.full((len(ids), 1), len(sequences[-1]))
            lengths[: len(sequences), 0] = torch.tensor([len(one) for one in sequences])
            mask = (torch.arange(ids.shape[1]) < lengths).long()
            options = {"attention_mask": mask.to(ids.device)}
        base = getattr(self.model, "base_model", self.model)
        with torch.inference_mode():
            found = base(input_ids=ids, **options).last_hidden_state
        return found[: len(sequences), : max(map(len, sequences))].float()

    def logits(self, sequences: Sequence[Sequence[int]], positions: Sequence[int]) -> Any:
        """Run one forward pass; return logits of shape (sequences, positions, vocabulary).

        Sequences are padded on the right, which the logits of a causal model do not depend on. So
        neither attention mask nor position ids are passed: architectures differ in how, or
        whether, they handle them.

        Parameters
        ----------
        sequences
            Token ids, of any lengths.
        positions
            Positions whose logits are returned, in ascending order.
        """
        import torch

        ids = torch.tensor(self.shapes.padded(sequences), device=self.model.device)
        found = []
        with torch.inference_mode():
            for some in self.shapes.kept(positions):
                kept = torch.tensor(some, device=ids.device)
                options = {"logits_to_keep": kept} if self._keeps_some else {}
                logits = self.model(input_ids=ids, use_cache=False, **options).logits
                logits = logits if self._keeps_some else logits[:, kept]
                found.append(logits[: len(sequences)])
            logits = torch.cat(found, 1) if len(found) > 1 else found[0]
            return logits[:, : len(positions)]

    def _logprobs(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int, int]]
    ) -> list[float]:
        """Run one forward pass; return log P of each wanted (sequence, position, token)."""
        import torch

        positions = sorted({position for _, position, _ in wanted})
        column = {position: at for at, position in enumerate(positions)}
        logits = self.logits(sequences, positions)
        at = [(line, column[position], token) for line, position, token in wanted]
        line, position, token = torch.tensor(at, device=logits.device).unbind(1)
        with torch.inference_mode():
            kept = torch.log_softmax(logits[line, position].float(), dim=-1)
            return kept.gather(1, token[:, None])[:, 0].tolist()


def _first_position(model: Any) -> int:
    """The position of a text's first token: after that of padding, as RoBERTa counts them."""
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        padding = getattr(positions, "padding_idx", None)
        if padding is not None:
            return int(padding) + 1
    return 0


def _n_embeddings(model: Any) -> int:
    """Number of tokens that are both in the input and in the output embedding."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(layer.weight) for layer in layers if layer is not None)


def _owned(scoring: Scoring, run: Sequence[int]) -> list[int]:
    """Choices scored on `run`: it is the first run that begins with all but their last token."""
    return [
        choice
        for choice, ending in enumerate(scoring.endings)
        if next(r for r in scoring.runs if r[: len(ending) - 1] == ending[:-1]) == run
    ]
