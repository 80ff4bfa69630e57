"""The live object of ``LLM``: what a user's own function is given, on a worker."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd

from dask_pcm.config import Config
from dask_pcm.errors import PromptError
from dask_pcm.inference.calls import (
    Answer,
    Classify,
    Continuation,
    Embed,
    Generate,
    Prompted,
    Score,
    TextScore,
)
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.options import checked_choices, checked_generation, checked_pooling
from dask_pcm.inference.padded import PaddedModel, in_turn
from dask_pcm.inference.prompts import Template
from dask_pcm.inference.served import attendant_of

_PROMPT, _COMPLETION = "prompt", "completion"


class RowsError(Exception):
    """Some texts of a call have no vector; the message has the first error and its place."""


class LanguageModel:
    """A loaded language model, for functions that are given to ``map_partitions``.

    Its methods take a list of texts and return a value for each, in their order. They may be called
    by several tasks at a time: an engine computes the texts of all of them together. A text that
    cannot be computed has an ``error``, and the others are unaffected; only ``embed``, which
    returns an array, raises ``RowsError``.

    Attributes
    ----------
    padded
        The model in padded batches, for what has no engine.
    is_attended
        Whether an engine computes it.
    content
        Digest of its files; None if unknown.

    Examples
    --------
    >>> def verdicts(df, model):
    ...     prompts = [f"Claim: {claim}\\nVerdict:" for claim in df["claim"]]
    ...     answers = model.classify(prompts, ["SUPPORTED", "REFUTED"])
    ...     return df[["id"]].assign(verdict=[one.answer for one in answers])
    """

    def __init__(
        self, padded: PaddedModel, *, is_attended: bool, content: str | None = None
    ) -> None:
        self.padded = padded
        self.is_attended = is_attended
        self.content = content
        self._serving: Serving | None = None
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        names = ("padded", "is_attended", "content")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # what is of one process is made anew

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"A {type(self).__name__} cannot be called. Use its methods classify, score, generate"
            " and embed, or with model.raw() as module: for transformers' model."
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}. Write"
            " with model.raw() as module: to use transformers' model."
        )

    @property
    def facts(self) -> dict[str, str]:
        """Device and dtype, recorded in the ledger."""
        return self.padded.facts

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers; a copy for each thread.

        Padding and truncation are settings of a tokenizer, not of a call, so threads must not
        share one.
        """
        found = getattr(self._local, "tokenizer", None)
        if found is None:
            found = self._local.tokenizer = copy.deepcopy(self.padded.tokenizer)
        return found

    @property
    def max_tokens(self) -> int | None:
        """Context length in tokens; None if neither model nor tokenizer states one."""
        return self.padded.max_tokens

    def attend(self) -> Serving:
        """Its engine; see ``Attendant``."""
        self._serving = attendant_of(self)
        return self._serving

    @contextmanager
    def raw(self) -> Iterator[Any]:
        """Within the block, this thread has transformers' model to itself.

        The engine and other tasks wait meanwhile, so keep the block short. Methods of this object
        may be called in it by this thread; in other threads they wait for the end of the block.

        Examples
        --------
        >>> def perplexities(df, model):
        ...     with model.raw() as module:
        ...         return df.assign(loss=[loss_of(module, text) for text in df["text"]])
        """
        # Not both: threads that use two models would wait for each other's.
        with in_turn() if self._serving is None else self._serving.alone():
            yield self.padded.model

    def classify(
        self,
        prompts: Sequence[str],
        choices: Sequence[str],
        *,
        normalize: str | None = None,
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> list[Answer]:
        """Choose one of several answers for each prompt; see ``dask_pcm.classify``.

        Parameters
        ----------
        prompts : sequence of str
            Whole prompts.
        truncate : bool, default False
            Whether a prompt that is too long is cut at its end; else it has an error.
        special_tokens : bool, default True
            Whether control tokens in prompts, such as ``<|im_end|>``, act as such. Set it to False
            for texts that are not trusted.
        """
        choices, normalize = checked_choices(choices, normalize)
        return self._values(
            Classify(**_options(truncate, special_tokens), choices=choices, normalize=normalize),
            {_PROMPT: prompts},
        )

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> list[TextScore]:
        """Score a text after each prompt; see ``dask_pcm.score`` and ``classify``.

        Raises
        ------
        PromptError
            If there are not as many completions as prompts.
        """
        prompts, completions = [*prompts], [*completions]
        if len(completions) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts have {len(completions)} completions.")
        return self._values(
            Score(**_options(truncate, special_tokens), completion=Template(f"{{{_COMPLETION}}}")),
            {_PROMPT: prompts, _COMPLETION: completions},
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = (),
        n: int = 1,
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> list[Any]:
        """Continue each prompt; see ``dask_pcm.generate`` and ``classify``.

        Returns
        -------
        list of Continuation
            One for each prompt; with ``n > 1``, a list of n for each.
        """
        options = checked_generation(max_tokens, temperature, top_k, top_p, seed, stop, n)
        found: list[list[Continuation]] = self._values(
            Generate(**_options(truncate, special_tokens), **options), {_PROMPT: prompts}
        )
        return found if n > 1 else [one for (one,) in found]

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> npt.NDArray[np.float32]:
        """Turn each text into a vector; see ``dask_pcm.embed`` and ``classify``.

        Returns
        -------
        numpy.ndarray
            Shape (texts, width), float32.

        Raises
        ------
        RowsError
            If a text cannot be embedded, for instance as it is too long.
        """
        how = checked_pooling(pooling, self.padded.folder, self.padded.is_causal)
        func = Embed(**_options(truncate, special_tokens), pooling=how, normalize=normalize)
        found = self._values(func, {_PROMPT: texts})
        wrong = [(k, one.error) for k, one in enumerate(found) if one.error is not None]
        if wrong:
            k, error = wrong[0]
            raise RowsError(f"{len(wrong)} of {len(found)} texts have no vector; text {k}: {error}")
        return np.stack([one.embedding for one in found]) if found else np.empty((0, 0), np.float32)

    def _values(self, func: Prompted, columns: dict[str, Sequence[str]]) -> Any:
        """The values of a function of texts, by the engine if there is one."""
        func.check_model(self.padded)
        for name, texts in columns.items():
            if isinstance(texts, str):
                raise PromptError(f"{name}s must be a list of texts; found one text, {texts!r:.80}")
        frame = pd.DataFrame({n: pd.Series([*texts], dtype=object) for n, texts in columns.items()})
        return func.values(frame, self if self._serving is None else self._serving)


def _options(truncate: bool, special_tokens: bool) -> dict[str, Any]:
    """Arguments of ``Prompted`` for whole prompts."""
    return {
        "template": Template(f"{{{_PROMPT}}}"),
        "truncate_column": _PROMPT if truncate else None,
        "kept": (),
        "batch_tokens": Config.read().batch_tokens,
        "special_tokens_in_fields": special_tokens,
    }
