"""Score a text after a prompt: its log-probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from dask_pcm.inference.calls.prompted import ERROR, ByScore, Fields, Prompted, checked_tokens
from dask_pcm.inference.engine.rows import RowError
from dask_pcm.inference.prompts import Scoring, Template, separator

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PaddedModel

LOGPROB, N_TOKENS = "logprob", "n_tokens"


@dataclass(frozen=True, slots=True)
class TextScore:
    """How probable a text is after a prompt.

    Attributes
    ----------
    logprob
        The sum of the log-probabilities of its tokens; NaN with an error.
    n_tokens
        Tokens of the text; None with an error.
    error
        Why there is none.
    """

    logprob: float
    n_tokens: int | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(ByScore):
    """The log-probability of a text after the prompt."""

    completion: Template

    __name__ = "score"

    @property
    def fields(self) -> tuple[str, ...]:
        """See ``Prompted``."""
        return tuple(dict.fromkeys((*self.template.fields, *self.completion.any_fields)))

    def about(self) -> dict[str, Any]:
        """See ``Prompted``."""
        return {**Prompted.about(self), "completion": self.completion.text}

    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Scoring | str]:
        """Tokenise every prompt with and without its completion."""
        prompts, is_trusted = self._prompts(rows), self.special_tokens_in_fields
        endings = [self.completion.text_of(row, is_trusted) for row in rows]
        texts = [
            prompt.joined(separator(str(prompt)), ending)
            for prompt, ending in zip(prompts, endings, strict=True)
        ]
        tokens = model.tokenize([*prompts, *texts]) if texts else []
        befores, wholes = tokens[: len(rows)], tokens[len(rows) :]
        found: list[Scoring | str] = []
        for ending, before, whole in zip(endings, befores, wholes, strict=True):
            n = _n_common(before, whole)
            if not str(ending).strip():
                found.append("The completion is empty.")
            elif not n:
                found.append("No token precedes the completion, so it cannot be scored.")
            elif n == len(whole):
                found.append("The completion has no token.")
            else:
                own = tuple(whole[n:])
                scoring = Scoring(tuple(whole[:n]), (own,), (own[:-1],))
                found.append(checked_tokens(model, scoring))
        return found

    def result(self, model: PaddedModel, plan: Scoring, found: Sequence[Any]) -> Any:
        """See ``Prompted``."""
        (scores,) = found
        return scores if isinstance(scores, RowError) else (scores[0], len(plan.endings[0]))

    def value(self, result: tuple[float, int] | str) -> TextScore:
        """See ``Prompted``."""
        if isinstance(result, str):
            return TextScore(math.nan, None, result)
        logprob, n_tokens = result
        if not math.isfinite(logprob):
            return TextScore(math.nan, None, f"The model's score is not finite: {logprob}.")
        return TextScore(logprob, n_tokens)

    def columns(self, values: Sequence[TextScore]) -> dict[str, Any]:
        """See ``Prompted``."""
        found: dict[str, Any] = {
            LOGPROB: [one.logprob for one in values],
            N_TOKENS: [one.n_tokens for one in values],
            ERROR: [one.error for one in values],
        }
        dtypes = self.dtypes()
        return {name: pd.array(found[name], dtype=dtype) for name, dtype in dtypes.items()}

    def dtypes(self) -> dict[str, Any]:
        """See ``Prompted``."""
        return {LOGPROB: "float64", N_TOKENS: "Int64", ERROR: "str"}


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
