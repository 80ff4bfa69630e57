"""Prompts are parsed, and the scoring of choices is planned, without torch or a model.

A plan states the token sequences that a model must run to score all choices of a row.
"""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask_pcm.errors import PromptError
from dask_pcm.inference.fields import as_text

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a text; `is_own` if control tokens spelled out in it act as control tokens."""

    text: str
    is_own: bool


@dataclass(frozen=True, slots=True)
class Text:
    """A template filled with a row; it keeps which parts are the template's own."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return "".join(part.text for part in self.parts)

    def followed_by(self, text: str) -> Text:
        """This text, followed by `text`, in which control tokens act as such."""
        return Text((*self.parts, Part(text, is_own=True)))

    def joined(self, between: str, other: Text) -> Text:
        """This text, `between`, and another text."""
        return Text((*self.followed_by(between).parts, *other.parts))


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt with fields in braces, such as ``Claim: {claim}\\nAnswer:``.

    Literal braces are doubled, as in ``str.format``.
    """

    text: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, each once.

        Raises
        ------
        PromptError
            If there is none, or one is not a plain name.

        Examples
        --------
        >>> Template("{claim} and {evidence}").fields
        ('claim', 'evidence')
        """
        if not self.any_fields:
            raise PromptError(
                f"The prompt has no field, so every row would get the same answer: {self.text!r}."
                " Name columns in braces, such as {claim}."
            )
        return self.any_fields

    @property
    def any_fields(self) -> tuple[str, ...]:
        """As ``fields``, but there may be none."""
        return tuple(dict.fromkeys(name for _, name in _parsed(self.text) if name is not None))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row as a string."""
        return str(self.text_of(row))

    def text_of(self, row: Mapping[str, Any], is_trusted: bool = False) -> Text:
        """The prompt of one row.

        Parameters
        ----------
        is_trusted
            Whether control tokens spelled out in the row's fields act as control tokens.

        Raises
        ------
        FieldError
            If a value cannot be written in a prompt.
        """
        parts = []
        for literal, name in _parsed(self.text):
            parts.append(Part(literal, is_own=True))
            if name is not None:
                parts.append(Part(as_text(row[name]), is_own=is_trusted))
        return Text(tuple(parts))


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[tuple[str, str | None], ...]:
    """The literal texts of a template, each with the field that follows it or None."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PromptError(
            f"The prompt cannot be parsed: {error}. Write {{{{ and }}}} for literal braces."
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise PromptError(
                f"The prompt's field {{{name}}} must be a plain column name, such as {{claim}};"
                " write {{ and }} for literal braces."
            )
    return tuple((literal, name) for literal, name, _, _ in parts)


def check_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """Return the choices as a tuple; raise PromptError if they are invalid or repeated.

    White space around a choice is ignored: it is neither compared nor scored.

    >>> check_choices(["yes", "no"])
    ('yes', 'no')
    """
    is_list = isinstance(choices, (list, tuple))  # no sets: the order decides ties
    if not is_list or not all(isinstance(choice, str) for choice in choices):
        raise PromptError(f"choices must be a list of strings; found {choices!r:.80}.")
    stripped = [choice.strip() for choice in choices]
    if len(choices) < 2:
        raise PromptError(f"choices needs at least two strings; found {list(choices)}.")
    if "" in stripped:
        raise PromptError(f"choices contains an empty string: {list(choices)}.")
    if repeated := sorted({choice for choice in stripped if stripped.count(choice) > 1}):
        raise PromptError(f"choices repeats {', '.join(map(repr, repeated))}.")
    return tuple(choices)


class ScoringError(Exception):
    """The choices of a row cannot be scored; the message becomes the row's error."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What must be run to score the choices of one row.

    Attributes
    ----------
    shared
        Token prefix common to all choices: the prompt, except tokens at its end that depend on
        the choice.
    endings
        For each choice its tokens after `shared`.
    runs
        The fewest sequences after `shared` that give every choice's log-probabilities: each
        choice without its last token is a prefix of one of them.
    """

    shared: Tokens
    endings: tuple[Tokens, ...]
    runs: tuple[Tokens, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest sequence to run."""
        return len(self.shared) + max(map(len, self.runs))


def separator(prompt: str) -> str:
    """The text between a prompt and a choice: a space, unless the prompt ends in white space."""
    return "" if not prompt or prompt[-1].isspace() else " "


def plan_scoring(sequences: Sequence[Sequence[int]], eos: int | None) -> Scoring:
    """Split tokenised prompt-and-choice texts into a shared prefix and endings.

    Parameters
    ----------
    sequences
        Token ids of prompt and choice together, one sequence per choice.
    eos
        Id of the end-of-text token. It is appended to all sequences if one is a prefix of another:
        otherwise the longer of the two could never win.

    Raises
    ------
    ScoringError
        If choices have the same tokens, or no token precedes them.

    Examples
    --------
    >>> scoring = plan_scoring([[1, 2, 7], [1, 2, 8], [1, 2, 9, 4, 5]], eos=0)
    >>> scoring.shared, scoring.endings, scoring.runs
    ((1, 2), ((7,), (8,), (9, 4, 5)), ((9, 4),))
    """
    tokens = [tuple(sequence) for sequence in sequences]
    if len(set(tokens)) < len(tokens):
        raise ScoringError("Some choices have the same tokens in this model's vocabulary.")
    if _has_prefix(tokens):
        if eos is None:
            raise ScoringError(
                "One choice is a prefix of another, and this model has no end-of-text token."
            )
        tokens = [(*sequence, eos) for sequence in tokens]
    n_shared = _n_shared(tokens)
    if not n_shared:
        raise ScoringError("No token precedes the answer, so it cannot be predicted.")
    endings = tuple(sequence[n_shared:] for sequence in tokens)
    starts = {ending[:-1] for ending in endings}
    runs = tuple(
        start
        for start in sorted(starts)
        if not any(other != start and other[: len(start)] == start for other in starts)
    )
    return Scoring(tokens[0][:n_shared], endings, runs)


def _has_prefix(sequences: Sequence[Tokens]) -> bool:
    """Whether one of the sequences is a prefix of another."""
    # In lexicographic order a prefix is directly followed by a sequence that it begins.
    ordered = sorted(sequences)
    return any(b[: len(a)] == a for a, b in itertools.pairwise(ordered))


def _n_shared(sequences: Sequence[Tokens]) -> int:
    """Length of the common prefix; that of the least and the greatest sequence is that of all."""
    low, high = min(sequences), max(sequences)
    n, most = 0, min(len(low), len(high))
    while n < most:  # by bisection: comparing slices is fast
        middle = (n + most + 1) // 2
        if low[:middle] == high[:middle]:
            n = middle
        else:
            most = middle - 1
    return n


def cut_to_fit(
    row: Mapping[str, Any],
    field: str,
    n_max: int,
    count: Callable[[Mapping[str, Any]], int],
) -> dict[str, Any] | None:
    """Truncate one field at its end, at a word boundary if possible, until the row fits.

    Parameters
    ----------
    row
        Fields of the prompt.
    field
        The field to truncate.
    n_max
        The model's context length in tokens.
    count
        Returns the number of tokens of a row, prompt and longest choice together.

    Returns
    -------
    dict or None
        The row with the longest prefix of the field that fits; None if not even a part of it does.
    """
    text = as_text(row[field])
    # Binary search: the largest number of characters that fits is in [low, high).
    low, high = 0, len(text)
    while low + 1 < high:
        middle = (low + high) // 2
        fits = count({**row, field: text[:middle]}) <= n_max
        low, high = (middle, high) if fits else (low, middle)
    cut = text[:low]
    is_inside_word = bool(cut) and not (text[low].isspace() or cut[-1].isspace())
    if is_inside_word and len(words := cut.rsplit(maxsplit=1)) > 1:
        cut = cut[: len(cut) - len(words[-1])]
    cut = cut.rstrip()
    return {**row, field: cut} if cut and count({**row, field: cut}) <= n_max else None
