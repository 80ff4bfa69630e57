"""``classify``: verbs of a language model on a Dask DataFrame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd
import pandas as pd

from dask_pcm.arguments import checked, frame_refused
from dask_pcm.config import Config
from dask_pcm.errors import PromptError, SchemaError
from dask_pcm.frames.map_partitions import check_columns, map_partitions
from dask_pcm.inference.fields import rows_of
from dask_pcm.inference.llm import LLM
from dask_pcm.inference.origins import check_fields
from dask_pcm.inference.padded import PlainModel
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
    truncate: str | None = None,
    keep: Sequence[str] | None = None,
    batch_rows: int | None = None,
    batch_timeout: float | str | None = None,
    special_tokens_in_fields: bool = False,
) -> dd.DataFrame:
    """Have a model choose an answer for every row.

    A choice scores the sum of the log-probabilities of its tokens after the prompt, prompt and
    choice tokenised together (with a space between, unless the prompt ends with white space). White
    space around a choice does not count. Where one choice begins another, the end of the answer is
    scored as well. A prompt begins with one token that begins a text, if the model has such.

    Parameters
    ----------
    ddf
        Any Dask DataFrame.
    llm
        The model.
    prompt
        Text with columns in braces: ``"Claim: {claim}\\nAnswer:"``. Columns may hold texts,
        integers (``3``), floats (``3.0``, as many digits as needed), booleans (``True``), decimals,
        dates and times (ISO 8601), and lists of texts, which are put one on a line.
    choices
        The answers to choose from, at least two.
    truncate
        A field of the prompt that may be cut at its end, by whole words, where a row is longer
        than the model takes. Without it such a row gets an error with both numbers.
    keep
        Columns of the input to keep; all by default.
    batch_rows
        Rows whose lengths are sorted together; ``pcm.inference.batch-rows`` by default.
    batch_timeout
        What so many rows may take, in seconds or as a text ("10m"); see ``map_partitions``.
    special_tokens_in_fields
        Whether control tokens, such as ``<|im_end|>``, count as such where a row spells them out.
        They do in the prompt's own text; in a row they are text like any other by default.

    Returns
    -------
    dask.dataframe.DataFrame
        The kept columns; ``answer``; ``answer_probability``, the softmax over the choices'
        scores (ties go to the first listed); and ``error``, null where there is an answer.

    Raises
    ------
    PromptError, SchemaError
        At once, where prompt, choices and columns do not go together, or a column of the prompt is
        of a type that has no form there.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise frame_refused("classify", ddf)
    if not isinstance(llm, LLM):
        raise PromptError(
            f"classify needs a dask_pcm.LLM; found {type(llm).__name__}. Write"
            " dask_pcm.LLM('folder or hub id'); a model that is loaded already does not travel."
        )
    if not isinstance(prompt, str):
        raise PromptError(f"The prompt must be a text with columns in braces; found {prompt!r}.")
    template = Template(prompt)
    fields = check_columns(ddf, template.fields, "The prompt")
    if truncate is not None and truncate not in fields:
        raise PromptError(
            f"truncate={truncate!r} is no field of the prompt; its fields are {', '.join(fields)}."
        )
    if repeated := sorted({str(name) for name in ddf.columns[ddf.columns.duplicated()]}):
        raise SchemaError(f"The frame has columns more than once: {', '.join(repeated)}.")
    check_fields(ddf, tuple(fields))
    kept = list(ddf.columns) if keep is None else check_columns(ddf, keep, "keep")
    if repeated := sorted({name for name in kept if kept.count(name) > 1}):
        raise SchemaError(f"keep names columns more than once: {', '.join(repeated)}.")
    if taken := [name for name in (ANSWER, PROBABILITY, ERROR) if name in kept]:
        raise SchemaError(
            f"The input already has {', '.join(map(repr, taken))}, which classify adds. Rename it,"
            " or choose the columns to keep with keep=[...]."
        )
    if not isinstance(special_tokens_in_fields, bool):
        raise PromptError(
            f"special_tokens_in_fields must be True or False; found {special_tokens_in_fields!r}."
        )
    config = Config.read()
    func = Classify(
        template,
        check_choices(choices),
        truncate,
        tuple(kept),
        config.batch_tokens,
        special_tokens_in_fields,
    )
    needed = list(dict.fromkeys([*kept, *fields]))
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
        required_columns=needed,
    )


@dataclass(frozen=True, slots=True)
class Classify:
    """What runs on a worker for each batch of rows."""

    template: Template
    choices: tuple[str, ...]
    truncate: str | None
    kept: tuple[str, ...]
    batch_tokens: int
    special_tokens_in_fields: bool = False

    __name__ = "classify"

    def about(self) -> dict[str, Any]:
        """What tells this job from another, for the ledger."""
        return {
            "prompt": self.template.text,
            "choices": list(self.choices),
            "truncate": self.truncate,
            "columns": list(self.kept),
            "special_tokens_in_fields": self.special_tokens_in_fields,
        }

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        # How many tokens go into one forward changes no answer.
        return ("dask_pcm.classify", *self.about().values())

    def __call__(self, frame: pd.DataFrame, model: PlainModel) -> pd.DataFrame:
        rows = rows_of(frame, self.template.fields)
        planned = self._plan(model, rows)
        scorings = [scoring for scoring in planned if isinstance(scoring, Scoring)]
        scores = iter(model.score(scorings, self.batch_tokens))
        answers = [
            self._answer(next(scores)) if isinstance(plan, Scoring) else (None, math.nan, plan)
            for plan in planned
        ]
        out = frame[list(self.kept)].copy()
        out[ANSWER] = pd.array([answer for answer, _, _ in answers], dtype="str")
        out[PROBABILITY] = [probability for _, probability, _ in answers]
        out[ERROR] = pd.array([error for _, _, error in answers], dtype="str")
        return out

    def _plan(self, model: PlainModel, rows: Sequence[dict[str, str] | str]) -> list[Scoring | str]:
        """What is to be run for each row, or why it cannot be answered."""
        good = [row for row in rows if not isinstance(row, str)]
        plans = iter(zip(good, self._scorings(model, good), strict=True))
        return [row if isinstance(row, str) else self._fit(model, *next(plans)) for row in rows]

    def _scorings(
        self, model: PlainModel, rows: Sequence[Mapping[str, str]]
    ) -> list[Scoring | str]:
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
        return found

    def _fit(self, model: PlainModel, row: dict[str, str], scoring: Scoring | str) -> Scoring | str:
        limit = model.max_tokens
        if isinstance(scoring, str) or limit is None or scoring.n_tokens <= limit:
            return scoring

        def count(cut: Mapping[str, str]) -> int:
            (found,) = self._scorings(model, [cut])
            return found.n_tokens if isinstance(found, Scoring) else limit + 1

        if self.truncate is not None:
            cut = cut_to_fit(row, self.truncate, limit, count)
            if cut is not None:
                return self._scorings(model, [cut])[0]
        return f"The row has {scoring.n_tokens} tokens; the model takes {limit}."

    def _answer(self, scores: list[float]) -> tuple[str | None, float, str | None]:
        if not all(map(math.isfinite, scores)):
            return None, math.nan, f"The model's scores are no numbers: {scores}."
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        total = sum(math.exp(score - scores[best]) for score in scores)
        return self.choices[best], 1.0 / total, None
