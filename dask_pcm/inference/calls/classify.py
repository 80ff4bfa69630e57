"""Choose one of several answers for a prompt, by the log-probability of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from dask_pcm.errors import PromptError
from dask_pcm.inference.calls.prompted import ERROR, ByScore, Fields, Prompted
from dask_pcm.inference.engine.rows import RowError
from dask_pcm.inference.prompts import Scoring, ScoringError, plan_scoring, separator

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PaddedModel

ANSWER, PROBABILITY, LOGPROBS = "answer", "answer_probability", "logprobs"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a prompt; None with an error.

    Attributes
    ----------
    probability
        The softmax over the scores of the choices; NaN with an error.
    logprobs
        The log-probability of each choice, in their order.
    error
        Why there is none.
    """

    answer: str | None
    probability: float
    logprobs: list[float] | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Classify(ByScore):
    """Chooses one of several answers.

    Attributes
    ----------
    normalize
        "tokens" compares log-probabilities per token of a choice; None their sums.
    has_logprobs
        Whether the log-probabilities are a column.
    """

    choices: tuple[str, ...]
    normalize: str | None = None
    has_logprobs: bool = False

    __name__ = "classify"

    def about(self) -> dict[str, Any]:
        """See ``Prompted``."""
        given: dict[str, Any] = {**Prompted.about(self), "choices": list(self.choices)}
        if self.normalize is not None:
            given["normalize"] = self.normalize
        if self.has_logprobs:
            given["logprobs"] = True
        return given

    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Scoring | str]:
        """Tokenise every prompt with every choice in one call."""
        texts = [
            prompt.followed_by(between + choice.strip())
            for prompt in self._prompts(rows)
            for between in [separator(str(prompt))]
            for choice in self.choices
        ]
        tokens = model.tokenize(texts) if texts else []
        n = len(self.choices)
        found: list[Scoring | str] = []
        for i in range(len(rows)):
            try:
                scoring = plan_scoring(tokens[i * n : i * n + n], model.eos)
                model.check_tokens(scoring)
                found.append(scoring)
            except ScoringError as error:
                found.append(str(error))
        if rows and not any(isinstance(one, Scoring) for one in found):
            self._check_apart(model)
        return found

    def result(self, model: PaddedModel, plan: Scoring, found: Sequence[Any]) -> Any:
        """Log-probabilities of the choices, and those that are compared."""
        (scores,) = found
        if isinstance(scores, RowError) or self.normalize is None:
            return scores if isinstance(scores, RowError) else (scores, scores)
        return scores, [
            score / len(ending) for score, ending in zip(scores, plan.endings, strict=True)
        ]

    def value(self, result: tuple[list[float], list[float]] | str) -> Answer:
        """See ``Prompted``."""
        if isinstance(result, str):
            return Answer(None, math.nan, None, result)
        raw, scores = result
        if not all(map(math.isfinite, scores)):
            return Answer(None, math.nan, None, f"The model's scores are not finite: {scores}.")
        # On a tie the first listed choice wins. Exponents are relative to the best score, so the
        # softmax cannot overflow.
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        total = sum(math.exp(score - scores[best]) for score in scores)
        return Answer(self.choices[best], 1.0 / total, raw)

    def columns(self, values: Sequence[Answer]) -> dict[str, Any]:
        """See ``Prompted``."""
        found: dict[str, Any] = {
            ANSWER: [one.answer for one in values],
            PROBABILITY: [one.probability for one in values],
            LOGPROBS: [one.logprobs for one in values],
            ERROR: [one.error for one in values],
        }
        dtypes = self.dtypes()
        return {name: pd.array(found[name], dtype=dtype) for name, dtype in dtypes.items()}

    def dtypes(self) -> dict[str, Any]:
        """See ``Prompted``."""
        import pyarrow as pa

        lists = {LOGPROBS: pd.ArrowDtype(pa.list_(pa.float64()))} if self.has_logprobs else {}
        return {ANSWER: "str", PROBABILITY: "float64", **lists, ERROR: "str"}

    def _check_apart(self, model: PaddedModel) -> None:
        """Raise PromptError if it is the choices, and no row, that the model cannot tell apart."""
        tokens = model.tokenize([f" {choice.strip()}" for choice in self.choices])
        same = [c for c, one in zip(self.choices, tokens, strict=True) if tokens.count(one) > 1]
        if same:
            raise PromptError(
                f"The choices {', '.join(map(repr, same))} have the same tokens in this model's"
                " vocabulary, so no row can be answered. Give choices that its tokenizer tells"
                " apart."
            )
