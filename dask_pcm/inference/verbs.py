"""Functions of a Dask DataFrame and a language model: one row in, one row out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.dataframe as dd
import pandas as pd

from dask_pcm.arguments import checked, frame_refused
from dask_pcm.config import Config
from dask_pcm.errors import PromptError, SchemaError
from dask_pcm.frames.map_partitions import check_columns, map_partitions
from dask_pcm.inference.calls import Classify, Embed, Generate, Prompted, Score
from dask_pcm.inference.calls.prompted import encoder_refused
from dask_pcm.inference.llm import LLM
from dask_pcm.inference.options import checked_choices, checked_generation, checked_pooling
from dask_pcm.inference.origins import check_fields
from dask_pcm.inference.prompts import Template


@checked
def classify(
    ddf: dd.DataFrame,
    llm: LLM,
    *,
    prompt: str,
    choices: Sequence[str],
    normalize: str | None = None,
    logprobs: bool = False,
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
    normalize : "tokens", optional
        Compare scores per token of a choice instead of their sums, which favour short choices.
    logprobs : bool, default False
        Whether to add ``logprobs``: the score of each choice, in their order, not normalised.
    truncate_column : str, optional
        A field of the prompt that is cut at its end, at a word boundary, if a row is longer than
        the model's context length. Without it, such a row gets an error that states both lengths
        in tokens.
    keep_columns : sequence of str, optional
        Columns of the input to keep. All by default.
    batch_rows : int, optional
        Rows that are handed to the model at a time. ``pcm.inference.batch-rows`` by default.
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
        choices (the first listed wins a tie); ``logprobs``, if asked for; and ``error``, null if
        there is an answer.

    Raises
    ------
    PromptError, SchemaError
        Raised immediately, if prompt, choices and columns do not fit together, or a column has a
        type that cannot be written in a prompt.
    """
    made = _Prepared.of("classify", ddf, llm, prompt, truncate_column, special_tokens_in_fields)
    given, normalize = checked_choices(choices, normalize)
    if not isinstance(logprobs, bool):
        raise PromptError(f"logprobs must be True or False; found {logprobs!r}.")
    func = Classify(
        **made.options(keep_columns), choices=given, normalize=normalize, has_logprobs=logprobs
    )
    return made.mapped(func, batch_rows, batch_timeout)


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
    func = Score(**made.options(keep_columns), completion=text)
    return made.mapped(func, batch_rows, batch_timeout)


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
    stop: str | Sequence[str] | None = (),
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
    given = checked_generation(max_tokens, temperature, top_k, top_p, seed, stop, n)
    return made.mapped(Generate(**made.options(keep_columns), **given), batch_rows, batch_timeout)


@checked
def embed(
    ddf: dd.DataFrame,
    llm: LLM,
    *,
    prompt: str,
    pooling: str | None = None,
    normalize: bool = True,
    truncate_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    batch_rows: int | None = None,
    batch_timeout: float | str | None = None,
    special_tokens_in_fields: bool = False,
) -> dd.DataFrame:
    """Turn a text into a vector, for every row, with an encoder or a causal language model.

    Parameters
    ----------
    llm : LLM
        The model; an encoder, such as those of sentence-transformers, or a causal model.
    prompt : str
        Template of the text, such as ``"{title}\n{body}"``.
    pooling : "mean", "cls" or "last", optional
        How the hidden states of a text's tokens become one: their mean, that of the first, or that
        of the last. By default as the model's folder says (``modules.json`` of
        sentence-transformers); else the mean for encoders, and the last for causal models.
    normalize : bool, default True
        Whether vectors have length 1, so that their dot product is the cosine.
    ddf, truncate_column, keep_columns, batch_rows, batch_timeout, special_tokens_in_fields
        As for ``classify``. Without `truncate_column`, a text that is longer than the model's
        context length gets an error.

    Returns
    -------
    dask.dataframe.DataFrame
        The kept columns; ``embedding``, a list of float32; and ``error``, null if there is a
        vector. ``np.stack(frame["embedding"])`` makes an array of the vectors.

    Raises
    ------
    PromptError, SchemaError
        As for ``classify``; and if the folder says that vectors need layers or a pooling that this
        function does not compute.
    """
    made = _Prepared.of("embed", ddf, llm, prompt, truncate_column, special_tokens_in_fields)
    if not isinstance(normalize, bool):
        raise PromptError(f"normalize must be True or False; found {normalize!r}.")
    how = checked_pooling(pooling, llm.path, not llm.is_encoder)
    func = Embed(**made.options(keep_columns), pooling=how, normalize=normalize)
    return made.mapped(func, batch_rows, batch_timeout)


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

    def options(self, keep_columns: Sequence[str] | None) -> dict[str, Any]:
        """Arguments of ``Prompted``."""
        kept = list(self.ddf.columns)
        if keep_columns is not None:
            kept = check_columns(self.ddf, keep_columns, "keep_columns")
        if repeated := sorted({name for name in kept if kept.count(name) > 1}):
            raise SchemaError(f"keep_columns names columns more than once: {', '.join(repeated)}.")
        return {
            "template": self.template,
            "truncate_column": self.truncate_column,
            "kept": tuple(kept),
            "batch_tokens": Config.read().batch_tokens,
            "special_tokens_in_fields": self.is_trusted,
        }

    def mapped(
        self, func: Prompted, batch_rows: int | None, batch_timeout: float | str | None
    ) -> dd.DataFrame:
        """The frame with the columns that a function adds."""
        if func.is_causal and self.llm.is_encoder:
            raise encoder_refused(func.__name__, f"{self.llm.name!r}")
        kept, added = list(func.kept), func.dtypes()
        if taken := [name for name in added if name in kept]:
            raise SchemaError(
                f"The input already has {', '.join(map(repr, taken))}, which is added. Rename it,"
                " or select the columns to keep with keep_columns=[...]."
            )
        index = self.ddf._meta.index[:0]
        empty = {name: pd.Series([], dtype=dtype, index=index) for name, dtype in added.items()}
        return map_partitions(
            func,
            self.ddf,
            context=self.llm,
            meta=self.ddf._meta[kept].assign(**empty),
            batch_rows=Config.read().batch_rows if batch_rows is None else batch_rows,
            batch_timeout=batch_timeout,
            required_columns=list(dict.fromkeys([*kept, *self.fields])),
        )
