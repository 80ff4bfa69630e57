"""Functions of a Dask DataFrame and a language model: one row in, one row out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.dataframe as dd
import pandas as pd

from dask_pcm.arguments import checked, frame_refused
from dask_pcm.config import Config
from dask_pcm.errors import PromptError, SchemaError
from dask_pcm.frames.map_partitions import check_columns, map_partitions
from dask_pcm.inference.calls import (
    ANSWER,
    ERROR,
    FINISH_REASON,
    LOGPROB,
    N_TOKENS,
    PROBABILITY,
    TEXT,
    Classify,
    Generate,
    Prompted,
    Score,
)
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.llm import LLM
from dask_pcm.inference.origins import check_fields
from dask_pcm.inference.prompts import Template, check_choices


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
    made = _Prepared.of("classify", ddf, llm, prompt, truncate_column, special_tokens_in_fields)
    kept = made.kept(keep_columns, (ANSWER, PROBABILITY, ERROR))
    func = Classify(**made.options(kept), choices=check_choices(choices))
    added = {ANSWER: "str", PROBABILITY: "f8", ERROR: "str"}
    return made.mapped(func, kept, added, batch_rows, batch_timeout)


@checked
def score(
    ddf: dd.DataFrame,
    llm: LLM,
    *,
    prompt: str,
    completion: str,
    truncate_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    batch_rows: int | None = None,
    batch_timeout: float | str | None = None,
    special_tokens_in_fields: bool = False,
) -> dd.DataFrame:
    """Say how likely a language model finds a text after a prompt, for every row.

    Prompt and completion are tokenised together, with a space between them unless the prompt ends
    with white space. Tokens that both have in common count as the prompt's.

    Parameters
    ----------
    completion : str
        Template of the text that is scored: ``"{answer}"``. Its white space counts.
    ddf, llm, prompt, truncate_column, keep_columns, batch_rows, batch_timeout, \
special_tokens_in_fields
        As for ``classify``.

    Returns
    -------
    dask.dataframe.DataFrame
        The kept columns; ``logprob``, the sum of log P(token | all tokens before it) over the
        completion's tokens; ``n_tokens``, how many these are; and ``error``, null if there is a
        score. The perplexity is ``exp(-logprob / n_tokens)``.

    Raises
    ------
    PromptError, SchemaError
        As for ``classify``.
    """
    made = _Prepared.of("score", ddf, llm, prompt, truncate_column, special_tokens_in_fields)
    if not isinstance(completion, str) or not completion.strip():
        raise PromptError(
            f"The completion must be text, such as '{{answer}}'; found {completion!r}."
        )
    text = Template(completion)
    made = made.with_fields(text.any_fields, "The completion")
    kept = made.kept(keep_columns, (LOGPROB, N_TOKENS, ERROR))
    func = Score(**made.options(kept), completion=text)
    added = {LOGPROB: "f8", N_TOKENS: "Int64", ERROR: "str"}
    return made.mapped(func, kept, added, batch_rows, batch_timeout)


@checked
def generate(
    ddf: dd.DataFrame,
    llm: LLM,
    *,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    n: int = 1,
    truncate_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    batch_rows: int | None = None,
    batch_timeout: float | str | None = None,
    special_tokens_in_fields: bool = False,
) -> dd.DataFrame:
    """Have a language model continue a prompt for every row.

    A continuation depends on the model, the prompt and the arguments, and on no other row: samples
    are drawn by a hash of `seed`, the prompt's tokens and the position. So equal prompts get equal
    continuations, and a row gets the same ones in any order or partition of the rows, as far as its
    logits are the same (in float32 on one kind of device).

    Parameters
    ----------
    max_tokens : int
        New tokens at most; fewer if the model's context length is reached.
    temperature : float, default 0
        0 takes the likeliest token each time; larger values sample.
    top_k : int, optional
        As many of the likeliest tokens are candidates; all by default.
    top_p : float, default 1
        Candidates are the fewest tokens whose probabilities sum to this or more.
    seed : int, default 0
        Another seed gives other samples.
    stop : str or sequence of str, optional
        Texts before which a continuation ends. It also ends at the model's end-of-text tokens.
    n : int, default 1
        Samples of each row. With more than one, the columns that are added hold lists.
    ddf, llm, prompt, truncate_column, keep_columns, batch_rows, batch_timeout, \
special_tokens_in_fields
        As for ``classify``.

    Returns
    -------
    dask.dataframe.DataFrame
        The kept columns; ``text``, what follows the prompt; ``n_tokens``, its tokens;
        ``finish_reason``, "stop" or, at the limit, "length"; and ``error``, null if there is a
        text.

    Raises
    ------
    PromptError, SchemaError
        As for ``classify``, and for arguments out of their range.
    """
    made = _Prepared.of("generate", ddf, llm, prompt, truncate_column, special_tokens_in_fields)
    for name, value in (("max_tokens", max_tokens), ("n", n)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PromptError(f"{name} is {value!r}; expected 1 or more.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(one, str) and one for one in stops):
        raise PromptError(f"stop must be texts that are not empty; found {stop!r}.")
    sampling = Sampling(temperature, top_k, top_p, seed)
    if n > 1 and not temperature:
        raise PromptError(f"n={n} with temperature 0 gives the same text {n} times; raise it.")
    kept = made.kept(keep_columns, (TEXT, N_TOKENS, FINISH_REASON, ERROR))
    func = Generate(**made.options(kept), max_tokens=max_tokens, sampling=sampling, stop=stops, n=n)
    return made.mapped(func, kept, func.dtypes(), batch_rows, batch_timeout)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What all of these functions are given, checked."""

    ddf: dd.DataFrame
    llm: LLM
    template: Template
    truncate_column: str | None
    is_trusted: bool
    fields: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        ddf: dd.DataFrame,
        llm: LLM,
        prompt: str,
        truncate_column: str | None,
        is_trusted: bool,
    ) -> _Prepared:
        """Check arguments; PromptError or SchemaError if they do not fit together."""
        if not isinstance(ddf, dd.DataFrame):
            raise frame_refused(name, ddf)
        if not isinstance(llm, LLM):
            raise PromptError(
                f"{name} needs a dask_pcm.LLM; found {type(llm).__name__}. Write"
                " dask_pcm.LLM('folder or hub id'); a loaded model cannot be sent to workers."
            )
        if not isinstance(prompt, str):
            raise PromptError(
                f"The prompt must be a string with column names in braces; found {prompt!r}."
            )
        template = Template(prompt)
        fields = tuple(check_columns(ddf, template.fields, "The prompt"))
        if truncate_column is not None and truncate_column not in fields:
            raise PromptError(
                f"truncate_column={truncate_column!r} is not a field of the prompt; its fields are"
                f" {', '.join(fields)}."
            )
        if repeated := sorted({str(name) for name in ddf.columns[ddf.columns.duplicated()]}):
            raise SchemaError(f"The frame has columns more than once: {', '.join(repeated)}.")
        check_fields(ddf, fields)
        if not isinstance(is_trusted, bool):
            raise PromptError(
                f"special_tokens_in_fields must be True or False; found {is_trusted!r}."
            )
        return cls(ddf, llm, template, truncate_column, is_trusted, fields)

    def with_fields(self, names: Sequence[str], what: str) -> _Prepared:
        """With further columns that are read."""
        more = tuple(check_columns(self.ddf, names, what))
        check_fields(self.ddf, more)
        return replace(self, fields=tuple(dict.fromkeys((*self.fields, *more))))

    def kept(self, keep_columns: Sequence[str] | None, added: Sequence[str]) -> list[str]:
        """Columns of the input that the result keeps; refuses those that are added."""
        kept = list(self.ddf.columns)
        if keep_columns is not None:
            kept = check_columns(self.ddf, keep_columns, "keep_columns")
        if repeated := sorted({name for name in kept if kept.count(name) > 1}):
            raise SchemaError(f"keep_columns names columns more than once: {', '.join(repeated)}.")
        if taken := [name for name in added if name in kept]:
            raise SchemaError(
                f"The input already has {', '.join(map(repr, taken))}, which is added. Rename it,"
                " or select the columns to keep with keep_columns=[...]."
            )
        return kept

    def options(self, kept: Sequence[str]) -> dict[str, Any]:
        """Arguments of ``Prompted``."""
        return {
            "template": self.template,
            "truncate_column": self.truncate_column,
            "kept": tuple(kept),
            "batch_tokens": Config.read().batch_tokens,
            "special_tokens_in_fields": self.is_trusted,
        }

    def mapped(
        self,
        func: Prompted,
        kept: Sequence[str],
        added: Mapping[str, Any],
        batch_rows: int | None,
        batch_timeout: float | str | None,
    ) -> dd.DataFrame:
        """The frame with the columns that a function adds, by name and dtype."""
        index = self.ddf._meta.index[:0]
        empty = {name: pd.Series([], dtype=dtype, index=index) for name, dtype in added.items()}
        return map_partitions(
            func,
            self.ddf,
            context=self.llm,
            meta=self.ddf._meta[list(kept)].assign(**empty),
            batch_rows=Config.read().batch_rows if batch_rows is None else batch_rows,
            batch_timeout=batch_timeout,
            required_columns=list(dict.fromkeys([*kept, *self.fields])),
        )
