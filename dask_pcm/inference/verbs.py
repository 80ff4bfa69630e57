"""``classify`` has a language model choose one answer for every row of a Dask DataFrame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd
import pandas as pd

from dask_pcm.arguments import checked, frame_refused
from dask_pcm.config import Config
from dask_pcm.errors import PromptError, SchemaError
from dask_pcm.frames.map_partitions import check_columns, map_partitions
from dask_pcm.inference.engine.rows import RowError, Scored, trie_of
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.fields import rows_as_text
from dask_pcm.inference.llm import LLM
from dask_pcm.inference.origins import check_fields
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.prompts import (
    Scoring,
    ScoringError,
    Template,
    check_choices,
    cut_to_fit,
    plan_scoring,
    separator,
)

ANSWER, PROBABILITY, ERROR = "answer", "answer_probability", "error"


@checked
def classify(
    ddf: dd.DataFrame,
    llm: LLM,
    *,
    prompt: str,
    choices: Sequence[str],
    truncate_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    batch_rows: int | None = None,
    batch_timeout: float | str | None = None,
    special_tokens_in_fields: bool = False,
) -> dd.DataFrame:
    """Have a language model choose one of several answers for every row.

    The score of a choice is the sum of the log-probabilities of its tokens given the prompt. Prompt
    and choice are tokenised together, with a space between them unless the prompt ends with white
    space. White space around a choice is ignored. If one choice is a prefix of another, an
    end-of-text token is appended to all choices and scored too. A prompt starts with exactly one
    beginning-of-text token, if the model has one.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        The rows to classify.
    llm : LLM
        The model.
    prompt : str
        Template with column names in braces: ``"Claim: {claim}\\nAnswer:"``. Columns may hold
        texts, integers (``3``), floats (``3.0``, shortest form that round-trips), booleans
        (``True``), decimals, dates and times (ISO 8601), and lists of texts, joined by line feeds.
    choices : sequence of str
        The possible answers, at least two.
    truncate_column : str, optional
        A field of the prompt that is cut at its end, at a word boundary, if a row is longer than
        the model's context length. Without it, such a row gets an error that states both lengths
        in tokens.
    keep_columns : sequence of str, optional
        Columns of the input to keep. All by default.
    batch_rows : int, optional
        Rows per call of the model; they are sorted by length and run in batches of at most
        ``pcm.inference.batch-tokens`` tokens. ``pcm.inference.batch-rows`` by default.
    batch_timeout : float or str, optional
        Limit for one call on `batch_rows` rows, in seconds or as text ("10m"); see
        ``map_partitions``.
    special_tokens_in_fields : bool, default False
        Whether control tokens, such as ``<|im_end|>``, that occur in a row's fields act as control
        tokens. By default they are plain text there, which prevents prompt injection by rows. In
        the template's own text they always act as control tokens.

    Returns
    -------
    dask.dataframe.DataFrame
        The kept columns; ``answer``; ``answer_probability``, the softmax over the scores of the
        choices (the first listed wins a tie); and ``error``, null if there is an answer.

    Raises
    ------
    PromptError, SchemaError
        Raised immediately, if prompt, choices and columns do not fit together, or a column has a
        type that cannot be written in a prompt.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise frame_refused("classify", ddf)
    if not isinstance(llm, LLM):
        raise PromptError(
            f"classify needs a dask_pcm.LLM; found {type(llm).__name__}. Write"
            " dask_pcm.LLM('folder or hub id'); a loaded model cannot be sent to workers."
        )
    if not isinstance(prompt, str):
        raise PromptError(
            f"The prompt must be a string with column names in braces; found {prompt!r}."
        )
    template = Template(prompt)
    fields = check_columns(ddf, template.fields, "The prompt")
    if truncate_column is not None and truncate_column not in fields:
        raise PromptError(
            f"truncate_column={truncate_column!r} is not a field of the prompt; its fields are"
            f" {', '.join(fields)}."
        )
    if repeated := sorted({str(name) for name in ddf.columns[ddf.columns.duplicated()]}):
        raise SchemaError(f"The frame has columns more than once: {', '.join(repeated)}.")
    check_fields(ddf, tuple(fields))
    kept = _kept_columns(ddf, keep_columns)
    if not isinstance(special_tokens_in_fields, bool):
        raise PromptError(
            f"special_tokens_in_fields must be True or False; found {special_tokens_in_fields!r}."
        )
    config = Config.read()
    func = Classify(
        template,
        check_choices(choices),
        truncate_column,
        tuple(kept),
        config.batch_tokens,
        special_tokens_in_fields,
    )
    added = {
        ANSWER: pd.Series([], dtype="str"),
        PROBABILITY: pd.Series([], dtype="f8"),
        ERROR: pd.Series([], dtype="str"),
    }
    meta = ddf._meta[kept].assign(**{k: v.set_axis(ddf._meta.index[:0]) for k, v in added.items()})
    return map_partitions(
        func,
        ddf,
        context=llm,
        meta=meta,
        batch_rows=config.batch_rows if batch_rows is None else batch_rows,
        batch_timeout=batch_timeout,
        required_columns=list(dict.fromkeys([*kept, *fields])),
    )


def _kept_columns(ddf: dd.DataFrame, keep_columns: Sequence[str] | None) -> list[str]:
    """Columns of the input that the result keeps; refuses those that ``classify`` adds."""
    kept = list(ddf.columns)
    if keep_columns is not None:
        kept = check_columns(ddf, keep_columns, "keep_columns")
    if repeated := sorted({name for name in kept if kept.count(name) > 1}):
        raise SchemaError(f"keep_columns names columns more than once: {', '.join(repeated)}.")
    if taken := [name for name in (ANSWER, PROBABILITY, ERROR) if name in kept]:
        raise SchemaError(
            f"The input already has {', '.join(map(repr, taken))}, which classify adds. Rename it,"
            " or select the columns to keep with keep_columns=[...]."
        )
    return kept


@dataclass(frozen=True, slots=True)
class Classify:
    """The function that a worker calls on each batch of rows."""

    template: Template
    choices: tuple[str, ...]
    truncate_column: str | None
    kept: tuple[str, ...]
    batch_tokens: int
    special_tokens_in_fields: bool = False

    __name__ = "classify"
    #: An engine has rows of several batches at a time; see ``Call.is_served``.
    is_served = True

    def about(self) -> dict[str, Any]:
        """The arguments that change answers; the ledger refuses to resume a job if they differ."""
        return {
            "prompt": self.template.text,
            "choices": list(self.choices),
            "truncate_column": self.truncate_column,
            "columns": list(self.kept),
            "special_tokens_in_fields": self.special_tokens_in_fields,
        }

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        # Without batch_tokens: the size of a forward pass changes no answer.
        return ("dask_pcm.classify", *self.about().values())

    def __call__(self, frame: pd.DataFrame, model: PaddedModel) -> pd.DataFrame:
        """Answers in padded batches."""
        planned = self._plan(model, rows_as_text(frame, self.template.fields))
        scorings = [scoring for scoring in planned if isinstance(scoring, Scoring)]
        return self._answered(frame, planned, model.score(scorings, self.batch_tokens))

    def submit(self, frame: pd.DataFrame, model: PaddedModel | Serving) -> Future[pd.DataFrame]:
        """Begin to answer by an engine; at once, if the model has none."""
        found: Future[pd.DataFrame] = Future()
        if isinstance(model, PaddedModel):
            found.set_result(self(frame, model))
            return found
        planned = self._plan(model.live, rows_as_text(frame, self.template.fields))
        request = [
            Scored(list(plan.shared), trie=trie_of(plan.endings))
            for plan in planned
            if isinstance(plan, Scoring)
        ]

        def finish(served: Future[list[Any]]) -> None:
            try:
                found.set_result(self._answered(frame, planned, served.result()))
            except BaseException as error:
                found.set_exception(error)

        model.submit(request).add_done_callback(finish)
        return found

    def _answered(
        self,
        frame: pd.DataFrame,
        planned: Sequence[Scoring | str],
        scores: Sequence[list[float] | RowError],
    ) -> pd.DataFrame:
        """The kept columns with answers; `scores` are those of the rows that were planned."""
        found = iter(scores)
        answers = [
            self._answer(next(found)) if isinstance(plan, Scoring) else (None, math.nan, plan)
            for plan in planned
        ]
        out = frame[list(self.kept)].copy()
        out[ANSWER] = pd.array([answer for answer, _, _ in answers], dtype="str")
        out[PROBABILITY] = [probability for _, probability, _ in answers]
        out[ERROR] = pd.array([error for _, _, error in answers], dtype="str")
        return out

    def _plan(
        self, model: PaddedModel, rows: Sequence[dict[str, str] | str]
    ) -> list[Scoring | str]:
        """The scoring of each row, or the error of a row that cannot be scored."""
        good = [row for row in rows if not isinstance(row, str)]
        plans = iter(zip(good, self._scorings(model, good), strict=True))
        return [row if isinstance(row, str) else self._fit(model, *next(plans)) for row in rows]

    def _scorings(
        self, model: PaddedModel, rows: Sequence[Mapping[str, str]]
    ) -> list[Scoring | str]:
        """Tokenise every prompt with every choice in one call; a scoring or an error per row."""
        prompts = [self.template.text_of(row, self.special_tokens_in_fields) for row in rows]
        texts = [
            prompt.followed_by(separator(str(prompt)) + choice.strip())
            for prompt in prompts
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

    def _fit(
        self, model: PaddedModel, row: dict[str, str], scoring: Scoring | str
    ) -> Scoring | str:
        """The scoring, truncated if it exceeds the context length; an error if it cannot fit."""
        limit = model.max_tokens
        if isinstance(scoring, str) or limit is None or scoring.n_tokens <= limit:
            return scoring

        def count(cut: Mapping[str, str]) -> int:
            """Tokens of a truncated row; over the limit if it cannot be scored."""
            (found,) = self._scorings(model, [cut])
            return found.n_tokens if isinstance(found, Scoring) else limit + 1

        if self.truncate_column is not None:
            cut = cut_to_fit(row, self.truncate_column, limit, count)
            if cut is not None:
                return self._scorings(model, [cut])[0]
        return f"The row has {scoring.n_tokens} tokens; the model takes {limit}."

    def _answer(self, scores: list[float] | RowError) -> tuple[str | None, float, str | None]:
        """Answer, probability and error of one row, from the log-probability of each choice."""
        if isinstance(scores, RowError):
            return None, math.nan, str(scores)
        if not all(map(math.isfinite, scores)):
            return None, math.nan, f"The model's scores are not finite: {scores}."
        # On a tie the first listed choice wins. Exponents are relative to the best score, so the
        # softmax cannot overflow.
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        total = sum(math.exp(score - scores[best]) for score in scores)
        return self.choices[best], 1.0 / total, None
