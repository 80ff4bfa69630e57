"""Any transformers model can be computed in padded batches, on one device.

Batches are padded on the right. A causal model's logits do not depend on later tokens, so no
attention mask is needed; encoders get one. ``probe`` verifies both when a model is loaded.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from dask_pcm.inference.engine.rows import NOT_A_NUMBER, Pooling, RowError
from dask_pcm.inference.engine.sampling import Sampling, perturbed
from dask_pcm.inference.prompts import Scoring, ScoringError, Text, batches_by_length
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
    short_tokens
        Longer sequences have other rotary frequencies, and transformers takes those of the longest
        sequence for a whole forward (LongRoPE). None if all have the same.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, is_causal: bool = True, folder: str = ""
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
        short = _short_tokens(config)
        is_all = short is None or (self.max_tokens is not None and self.max_tokens <= short)
        self.short_tokens = None if is_all else short
        self.n_embeddings = _n_embeddings(model)
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
        for group in self._batches(lengths, batch_tokens):
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

    def _batches(self, lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
        """``batches_by_length`` of sequences that have the same rotary frequencies."""
        if self.short_tokens is None:
            return batches_by_length(lengths, batch_tokens)
        found = []
        for is_long in (True, False):
            mine = [k for k, n in enumerate(lengths) if (n > self.short_tokens) == is_long]
            groups = batches_by_length([lengths[k] for k in mine], batch_tokens)
            found += [[mine[k] for k in group] for group in groups]
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        n_max: Sequence[int],
        sampling: Sampling,
        is_over: Callable[[Sequence[int]], bool] | None,
        batch_tokens: int,
        stops: frozenset[int] | None = None,
    ) -> list[list[int] | RowError]:
        """Continue prompts with transformers' ``generate``, those of the same length together.

        Nothing is padded: models that have no engine differ in what they make of padding. Some
        mix the states of a batch's rows; these are continued one row at a time.

        Parameters
        ----------
        prompts, numbers, n_max
            Token ids of each row, the number that its samples depend on, and new tokens at most.
        is_over
            Says of a row's new tokens whether they are enough.
        batch_tokens
            Tokens of a batch at most, new ones included.
        stops
            Tokens that end a row; those of the model by default.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (prompt, n) in enumerate(zip(prompts, n_max, strict=True)):
            groups.setdefault((len(prompt), n), []).append(row)
        found: list[list[int] | RowError] = [[] for _ in prompts]
        with _one_at_a_time:
            for (n_prompt, n), rows in groups.items():
                size = max(1, batch_tokens // (n_prompt + n))
                if len(rows) > 1 and not self._continues_batches:
                    size = 1
                for at in range(0, len(rows), size):
                    batch = rows[at : at + size]
                    new = self._continued(
                        [prompts[k] for k in batch],
                        [numbers[k] for k in batch],
                        n,
                        sampling,
                        is_over,
                        self.stops if stops is None else stops,
                    )
                    for row, tokens in zip(batch, new, strict=True):
                        found[row] = tokens
        return found

    @functools.cached_property
    def _continues_batches(self) -> bool:
        """Whether rows of a batch have the logits that they have alone once they are continued.

        Not so for RWKV in transformers 5.23.
        """
        import torch

        n = self.n_embeddings
        texts = torch.tensor(
            [[(7 * k + 3) % n for k in range(8)], [(5 * k + 4) % n for k in range(8)]]
        )
        both = self._logits_of_second(texts)
        alone = torch.cat([self._logits_of_second(text[None]) for text in texts])
        # Half precision may send a token to another expert; then rows are continued one at a time.
        most = 1e-3 if self.model.dtype.itemsize >= 4 else 0.1
        return bool(((both - alone).std(-1) <= most * alone.std(-1)).all())

    def _logits_of_second(self, texts: Any) -> Any:
        """Logits of the second new token of texts, shape (texts, vocabulary)."""
        import torch
        import transformers

        ids = texts.to(self.model.device)
        settings = transformers.GenerationConfig(
            min_new_tokens=2,
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            found = self.model.generate(ids, attention_mask=mask, generation_config=settings)
        return found.logits[1].float()

    def _continued(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        n_max: int,
        sampling: Sampling,
        is_over: Callable[[Sequence[int]], bool] | None,
        stops: frozenset[int],
    ) -> list[list[int] | RowError]:
        """Continue prompts of the same length."""
        import torch
        import transformers

        n_prompt = len(prompts[0])
        ids = torch.tensor(prompts, device=self.model.device)
        fill = next(iter(stops), 0)
        is_number = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)

        def choose(tokens: Any, logits: Any) -> Any:
            is_number.logical_and_(~logits.isnan().any(-1))
            return perturbed(logits.float(), sampling, numbers, [tokens.shape[1]] * len(prompts))

        def ends(tokens: Any, logits: Any, **_: Any) -> Any:
            over = [is_over is not None and is_over(one) for one in tokens[:, n_prompt:].tolist()]
            return torch.tensor(over, device=tokens.device)

        settings = transformers.GenerationConfig(
            max_new_tokens=n_max,
            do_sample=False,
            eos_token_id=sorted(stops) or None,
            pad_token_id=fill,
        )
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=transformers.LogitsProcessorList([choose]),
                stopping_criteria=transformers.StoppingCriteriaList([ends]),
            )
        found: list[list[int] | RowError] = []
        for tokens, is_good in zip(out[:, n_prompt:].tolist(), is_number.tolist(), strict=True):
            if not is_good:
                found.append(RowError(NOT_A_NUMBER))
                continue
            end = next((k for k, token in enumerate(tokens) if token in stops), len(tokens))
            row = tokens[:end]
            while is_over is not None and row and is_over(row[:-1]):  # others went on
                row = row[:-1]
            found.append(row)
        return found

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
            for group in self._batches([len(text) for text in texts], batch_tokens):
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

        n_tokens = max(map(len, sequences))
        padded = [[*tokens, *[tokens[-1]] * (n_tokens - len(tokens))] for tokens in sequences]
        options: dict[str, Any] = {"use_cache": False}
        if not self.is_causal:
            lines = [[1] * len(tokens) + [0] * (n_tokens - len(tokens)) for tokens in sequences]
            options = {"attention_mask": torch.tensor(lines, device=self.model.device)}
        ids = torch.tensor(padded, device=self.model.device)
        base = getattr(self.model, "base_model", self.model)
        with torch.inference_mode():
            return base(input_ids=ids, **options).last_hidden_state.float()

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

        n_tokens = max(map(len, sequences))
        # Pad each sequence with its own last token: not every model has a padding token.
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


def _short_tokens(config: Any) -> int | None:
    """Tokens up to which sequences have the rotary frequencies of short ones; None if all have."""
    told = getattr(config, "rope_parameters", None) or {}
    # One set for all layers, or one for each kind of layer.
    parts = [told, *(part for part in told.values() if isinstance(part, dict))]
    limits = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for part in parts
        if part.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)


def _owned(scoring: Scoring, run: Sequence[int]) -> list[int]:
    """Choices scored on `run`: it is the first run that begins with all but their last token."""
    return [
        choice
        for choice, ending in enumerate(scoring.endings)
        if next(r for r in scoring.runs if r[: len(ending) - 1] == ending[:-1]) == run
    ]
