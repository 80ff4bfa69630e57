"""What workers do with a batch of rows: choose an answer, score a text, or continue the prompt.

Each row is planned on the task's thread: its prompt is filled, tokenised and cut to the model's
context length. Then an engine computes it among the rows of other batches (``submit``), or it is
computed here in padded batches, if the model has no engine (``__call__``).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from dask_pcm.errors import PromptError
from dask_pcm.inference.engine.rows import Generated, Row, RowError, Scored, trie_of
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.fields import rows_as_text
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.prompts import (
    Scoring,
    ScoringError,
    Template,
    Text,
    Tokens,
    cut_to_fit,
    plan_scoring,
    separator,
)

ERROR = "error"
Fields = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted(ABC):
    """A function of batches of rows, each of which becomes a prompt.

    Attributes
    ----------
    template
        The prompt.
    truncate_column
        The field that is cut if a row is too long.
    kept
        Columns of the input that the result keeps.
    batch_tokens
        Tokens of a padded batch.
    special_tokens_in_fields
        Whether control tokens count in fields.
    """

    template: Template
    truncate_column: str | None
    kept: tuple[str, ...]
    batch_tokens: int
    special_tokens_in_fields: bool = False

    #: An engine has rows of several batches at a time; see ``Call.is_served``.
    is_served: ClassVar[bool] = True

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that are read."""
        return self.template.fields

    def about(self) -> dict[str, Any]:
        """The arguments that change results; the ledger refuses to resume a job if they differ."""
        return {
            "prompt": self.template.text,
            "truncate_column": self.truncate_column,
            "columns": list(self.kept),
            "special_tokens_in_fields": self.special_tokens_in_fields,
        }

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        # Without batch_tokens: the size of a forward pass changes no result.
        return (type(self).__name__, *self.about().items())

    def __call__(self, frame: pd.DataFrame, model: PaddedModel) -> pd.DataFrame:
        """Results in padded batches."""
        planned = self._plan(model, rows_as_text(frame, self.fields))
        plans = [plan for plan in planned if not isinstance(plan, str)]
        return self._joined(frame, planned, self.padded(model, plans))

    def submit(self, frame: pd.DataFrame, model: PaddedModel | Serving) -> Future[pd.DataFrame]:
        """Begin a batch by an engine; it is computed at once, if the model has none."""
        found: Future[pd.DataFrame] = Future()
        if isinstance(model, PaddedModel):
            found.set_result(self(frame, model))
            return found
        live: PaddedModel = model.live
        planned = self._plan(live, rows_as_text(frame, self.fields))
        rows = [self.rows(live, plan) for plan in planned if not isinstance(plan, str)]

        def finish(served: Future[list[Any]]) -> None:
            try:
                each = iter(served.result())
                plans = (plan for plan in planned if not isinstance(plan, str))
                results = [
                    self.result(live, plan, [next(each) for _ in mine])
                    for plan, mine in zip(plans, rows, strict=True)
                ]
                found.set_result(self._joined(frame, planned, results))
            except BaseException as error:
                found.set_exception(error)

        model.submit([row for mine in rows for row in mine]).add_done_callback(finish)
        return found

    @abstractmethod
    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Any]:
        """What is computed of each row; a text for one that has an error."""

    @abstractmethod
    def n_tokens(self, plan: Any) -> int:
        """Tokens that a row takes of the model's context length."""

    @abstractmethod
    def rows(self, model: PaddedModel, plan: Any) -> list[Row]:
        """What an engine computes of a row."""

    @abstractmethod
    def result(self, model: PaddedModel, plan: Any, found: Sequence[Any]) -> Any:
        """The result of a row, of what an engine has found for each of ``rows``."""

    @abstractmethod
    def padded(self, model: PaddedModel, plans: Sequence[Any]) -> list[Any]:
        """The result of each row, in padded batches."""

    @abstractmethod
    def columns(self, results: Sequence[Any]) -> dict[str, Any]:
        """The columns that are added, ``error`` among them; an error is a text."""

    def _joined(
        self, frame: pd.DataFrame, planned: Sequence[Any], results: Sequence[Any]
    ) -> pd.DataFrame:
        """The kept columns, and those of all rows; `results` are of the rows without an error."""
        each = iter(results)
        whole = [plan if isinstance(plan, str) else next(each) for plan in planned]
        whole = [str(one) if isinstance(one, RowError) else one for one in whole]
        out = frame[list(self.kept)].copy()
        for name, values in self.columns(whole).items():
            out[name] = values
        return out

    def _plan(self, model: PaddedModel, rows: Sequence[dict[str, str] | str]) -> list[Any]:
        """The plan of each row, or the error of a row that cannot be computed."""
        good = [row for row in rows if not isinstance(row, str)]
        found: Iterator[Any] = iter(zip(good, self.plans(model, good), strict=True))
        return [row if isinstance(row, str) else self._fit(model, *next(found)) for row in rows]

    def _fit(self, model: PaddedModel, row: Fields, plan: Any) -> Any:
        """The plan, of a row cut to the context length if needed; an error if it cannot fit."""
        limit = model.max_tokens
        if isinstance(plan, str) or limit is None or self.n_tokens(plan) <= limit:
            return plan

        def count(cut: Fields) -> int:
            """Tokens of a row that was cut; over the limit if it cannot be computed."""
            (found,) = self.plans(model, [cut])
            return limit + 1 if isinstance(found, str) else self.n_tokens(found)

        if self.truncate_column is not None:
            cut = cut_to_fit(row, self.truncate_column, limit, count)
            if cut is not None:
                return self.plans(model, [cut])[0]
        return f"The row has {self.n_tokens(plan)} tokens; the model takes {limit}."

    def _prompts(self, rows: Sequence[Fields]) -> list[Text]:
        return [self.template.text_of(row, self.special_tokens_in_fields) for row in rows]


class _Scoring(Prompted):
    """Endings of the prompt are scored."""

    __slots__ = ()

    def n_tokens(self, plan: Scoring) -> int:
        """See ``Prompted``."""
        return plan.n_tokens

    def rows(self, model: PaddedModel, plan: Scoring) -> list[Row]:
        """See ``Prompted``."""
        return [Scored(list(plan.shared), trie=trie_of(plan.endings))]


ANSWER, PROBABILITY = "answer", "answer_probability"


@dataclass(frozen=True, slots=True, kw_only=True)
class Classify(_Scoring):
    """Chooses one of several answers."""

    choices: tuple[str, ...]

    __name__ = "classify"

    def about(self) -> dict[str, Any]:
        """See ``Prompted``."""
        return {**Prompted.about(self), "choices": list(self.choices)}

    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Scoring | str]:
        """Tokenise every prompt with every choice in one call."""
        texts = [
            prompt.followed_by(separator(str(prompt)) + choice.strip())
            for prompt in self._prompts(rows)
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
        """See ``Prompted``."""
        return found[0]

    def padded(self, model: PaddedModel, plans: Sequence[Scoring]) -> list[Any]:
        """See ``Prompted``."""
        return list(model.score(plans, self.batch_tokens))

    def columns(self, results: Sequence[list[float] | str]) -> dict[str, Any]:
        """See ``Prompted``."""
        answers = [self._answer(scores) for scores in results]
        return {
            ANSWER: pd.array([answer for answer, _, _ in answers], dtype="str"),
            PROBABILITY: [probability for _, probability, _ in answers],
            ERROR: pd.array([error for _, _, error in answers], dtype="str"),
        }

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

    def _answer(self, scores: list[float] | str) -> tuple[str | None, float, str | None]:
        """Answer, probability and error of one row, from the log-probability of each choice."""
        if isinstance(scores, str):
            return None, math.nan, scores
        if not all(map(math.isfinite, scores)):
            return None, math.nan, f"The model's scores are not finite: {scores}."
        # On a tie the first listed choice wins. Exponents are relative to the best score, so the
        # softmax cannot overflow.
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        total = sum(math.exp(score - scores[best]) for score in scores)
        return self.choices[best], 1.0 / total, None


LOGPROB, N_TOKENS = "logprob", "n_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(_Scoring):
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
                found.append(_checked(model, scoring))
        return found

    def result(self, model: PaddedModel, plan: Scoring, found: Sequence[Any]) -> Any:
        """See ``Prompted``."""
        (scores,) = found
        return scores if isinstance(scores, RowError) else (scores[0], len(plan.endings[0]))

    def padded(self, model: PaddedModel, plans: Sequence[Scoring]) -> list[Any]:
        """See ``Prompted``."""
        scores = model.score(plans, self.batch_tokens)
        return [self.result(model, plan, [one]) for plan, one in zip(plans, scores, strict=True)]

    def columns(self, results: Sequence[tuple[float, int] | str]) -> dict[str, Any]:
        """See ``Prompted``."""
        whole = [_finite(one) for one in results]
        return {
            LOGPROB: [math.nan if isinstance(one, str) else one[0] for one in whole],
            N_TOKENS: pd.array(
                [None if isinstance(one, str) else one[1] for one in whole], dtype="Int64"
            ),
            ERROR: pd.array([one if isinstance(one, str) else None for one in whole], dtype="str"),
        }


TEXT, FINISH_REASON = "text", "finish_reason"


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text that follows a prompt.

    Attributes
    ----------
    n_tokens
        Tokens that were generated.
    reason
        "stop" at a stop token or string, "length" at the limit.
    """

    text: str
    n_tokens: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(Prompted):
    """Continues the prompt.

    Attributes
    ----------
    max_tokens
        New tokens at most.
    stop
        Texts before which a continuation ends.
    n
        Continuations of each row.
    """

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n: int = 1

    __name__ = "generate"

    def about(self) -> dict[str, Any]:
        """See ``Prompted``."""
        return {
            **Prompted.about(self),
            "max_tokens": self.max_tokens,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
            "stop": list(self.stop),
            "n": self.n,
        }

    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Tokens | str]:
        """Tokenise every prompt."""
        tokens = model.tokenize(self._prompts(rows)) if rows else []
        return [
            _checked(model, tuple(one)) if one else "The prompt has no token." for one in tokens
        ]

    def n_tokens(self, plan: Tokens) -> int:
        """Those of the prompt, and one that is new."""
        return len(plan) + 1

    def rows(self, model: PaddedModel, plan: Tokens) -> list[Row]:
        """See ``Prompted``."""
        is_over = self._is_over(model) if self.stop else None
        return [
            Generated(
                list(plan),
                n_prompt=len(plan),
                n_max=self._n_max(model, plan),
                stops=model.stops,
                sampling=self.sampling,
                number=number,
                is_over=is_over,
            )
            for number in self._numbers(plan)
        ]

    def result(self, model: PaddedModel, plan: Tokens, found: Sequence[Any]) -> Any:
        """See ``Prompted``."""
        failed = next((one for one in found if isinstance(one, RowError)), None)
        return failed or [self._continuation(model, plan, tokens) for tokens in found]

    def padded(self, model: PaddedModel, plans: Sequence[Tokens]) -> list[Any]:
        """See ``Prompted``."""
        wanted = [(plan, number) for plan in plans for number in self._numbers(plan)]
        each = iter(
            model.generate(
                [plan for plan, _ in wanted],
                [number for _, number in wanted],
                [self._n_max(model, plan) for plan, _ in wanted],
                self.sampling,
                self._is_over(model) if self.stop else None,
                self.batch_tokens,
            )
        )
        return [self.result(model, plan, [next(each) for _ in range(self.n)]) for plan in plans]

    def columns(self, results: Sequence[list[Continuation] | str]) -> dict[str, Any]:
        """See ``Prompted``; a list in each row, for several continuations."""
        found: dict[str, list[Any]] = {TEXT: [], N_TOKENS: [], FINISH_REASON: [], ERROR: []}
        for one in results:
            is_failed = isinstance(one, str)
            values: dict[str, list[Any]] = {
                TEXT: [c.text for c in one if not isinstance(c, str)],
                N_TOKENS: [c.n_tokens for c in one if not isinstance(c, str)],
                FINISH_REASON: [c.reason for c in one if not isinstance(c, str)],
            }
            for name, each in values.items():
                found[name].append(None if is_failed else each if self.n > 1 else each[0])
            found[ERROR].append(one if is_failed else None)
        return {name: pd.array(found[name], dtype=self.dtypes()[name]) for name in found}

    def dtypes(self) -> dict[str, Any]:
        """Of the columns that are added."""
        import pyarrow as pa

        single = {TEXT: "str", N_TOKENS: "Int64", FINISH_REASON: "str"}
        lists = {
            TEXT: pd.ArrowDtype(pa.list_(pa.string())),
            N_TOKENS: pd.ArrowDtype(pa.list_(pa.int64())),
            FINISH_REASON: pd.ArrowDtype(pa.list_(pa.string())),
        }
        return {**(single if self.n == 1 else lists), ERROR: "str"}

    def _n_max(self, model: PaddedModel, plan: Tokens) -> int:
        if model.max_tokens is None:
            return self.max_tokens
        return min(self.max_tokens, model.max_tokens - len(plan))

    def _numbers(self, plan: Tokens) -> list[int]:
        """What samples of a row depend on, beside the seed: its prompt, and which sample it is.

        So they are the same in any order and partition of the rows.
        """
        digest = hashlib.blake2b(array("q", plan).tobytes(), digest_size=8).digest()
        first = int.from_bytes(digest, "little", signed=True)
        return [first + k for k in range(self.n)]

    def _is_over(self, model: PaddedModel) -> Any:
        # A character takes four tokens at most, where tokens are bytes.
        n_tail = 4 * max(map(len, self.stop)) + 8

        def is_over(tokens: Sequence[int]) -> bool:
            tail = model.decode(tokens[-n_tail:])
            return any(one in tail for one in self.stop)

        return is_over

    def _continuation(
        self, model: PaddedModel, plan: Tokens, tokens: Sequence[int]
    ) -> Continuation:
        text = model.decode(tokens)
        ends = [at for one in self.stop if (at := text.find(one)) >= 0]
        is_full = len(tokens) >= self._n_max(model, plan) and not ends
        text = text[: min(ends)] if ends else text
        return Continuation(text, len(tokens), "length" if is_full else "stop")


def _checked(model: PaddedModel, plan: Any) -> Any:
    """The plan; the error of a row with a token that the model does not know."""
    try:
        model.check_tokens(plan)
    except ScoringError as error:
        return str(error)
    return plan


def _finite(result: tuple[float, int] | str) -> tuple[float, int] | str:
    if isinstance(result, str) or math.isfinite(result[0]):
        return result
    return f"The model's score is not finite: {result[0]}."


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
