"""Prompts and choices, without torch: templates, joint tokenisation, what a model must run."""

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
    """Some of a text, and whether control tokens that are spelt out in it are meant as such."""

    text: str
    is_own: bool


@dataclass(frozen=True, slots=True)
class Text:
    """A text that a template and a row have made together."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return "".join(part.text for part in self.parts)

    def followed_by(self, text: str) -> Text:
        """This text and more that is meant as written."""
        return Text((*self.parts, Part(text, is_own=True)))


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
            Where there is none, or one is not a plain name.

        Examples
        --------
        >>> Template("{claim} and {evidence}").fields
        ('claim', 'evidence')
        """
        names = [name for _, name in _parsed(self.text) if name is not None]
        if not names:
            raise PromptError(
                f"The prompt has no field, so every row would get the same answer: {self.text!r}."
                " Name columns in braces, such as {claim}."
            )
        return tuple(dict.fromkeys(names))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row, as one text."""
        return str(self.text_of(row))

    def text_of(self, row: Mapping[str, Any], is_trusted: bool = False) -> Text:
        """The prompt of one row.

        Parameters
        ----------
        is_trusted
            Whether control tokens that a row spells out are meant as such.

        Raises
        ------
        FieldError
            Where a value has no form in a prompt.
        """
        parts = []
        for literal, name in _parsed(self.text):
            parts.append(Part(literal, is_own=True))
            if name is not None:
                parts.append(Part(as_text(row[name]), is_own=is_trusted))
        return Text(tuple(parts))


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[tuple[str, str | None], ...]:
    """Literal texts, and the field after each; None after the last."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PromptError(
            f"The prompt cannot be parsed: {error}. Write {{{{ and }}}} for literal braces."
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise PromptError(
                f"The prompt's field {{{name}}} must be the plain name of a column, such as"
                " {claim}; write {{ and }} for literal braces."
            )
    return tuple((literal, name) for literal, name, _, _ in parts)


def check_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """Return the choices; raise PromptError where they cannot be told apart.

    White space around a choice does not count: it is neither compared nor scored.

    >>> check_choices(["yes", "no"])
    ('yes', 'no')
    """
    is_list = isinstance(choices, (list, tuple))  # the order decides ties
    if not is_list or not all(isinstance(choice, str) for choice in choices):
        raise PromptError(f"choices must be a list of texts; found {choices!r:.80}.")
    stripped = [choice.strip() for choice in choices]
    if len(choices) < 2:
        raise PromptError(f"choices needs at least two texts; found {list(choices)}.")
    if "" in stripped:
        raise PromptError(f"choices holds an empty text: {list(choices)}.")
    if repeated := sorted({choice for choice in stripped if stripped.count(choice) > 1}):
        raise PromptError(f"choices repeats {', '.join(map(repr, repeated))}.")
    return tuple(choices)


class ScoringError(Exception):
    """A row whose choices cannot be scored; its text is the row's error."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What must be run to score the choices of one row.

    Attributes
    ----------
    shared
        Tokens that the row has in common for all choices: the prompt, as far as its tokens do
        not depend on what follows.
    endings
        For each choice its tokens after `shared`.
    runs
        The fewest sequences after `shared` that show every choice's log-probabilities: each
        choice without its last token is the beginning of one of them.
    """

    shared: Tokens
    endings: tuple[Tokens, ...]
    runs: tuple[Tokens, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest sequence to run."""
        return len(self.shared) + max(map(len, self.runs))


def separator(prompt: str) -> str:
    """What stands between a prompt and its answer: a space, unless the prompt ends with one."""
    return "" if not prompt or prompt[-1].isspace() else " "


def plan_scoring(sequences: Sequence[Sequence[int]], eos: int | None) -> Scoring:
    """Split tokenised prompt-and-choice texts into what they share and how they end.

    Parameters
    ----------
    sequences
        Token ids of prompt and choice together, one for each choice.
    eos
        Token that ends an answer. Appended to all where one choice begins with another: the
        longer of the two could never win otherwise.

    Raises
    ------
    ScoringError
        Where the model cannot tell the choices apart, or has nothing to predict them from.

    Examples
    --------
    >>> scoring = plan_scoring([[1, 2, 7], [1, 2, 8], [1, 2, 9, 4, 5]], eos=0)
    >>> scoring.shared, scoring.endings, scoring.runs
    ((1, 2), ((7,), (8,), (9, 4, 5)), ((9, 4),))
    """
    tokens = [tuple(sequence) for sequence in sequences]
    if len(set(tokens)) < len(tokens):
        raise ScoringError("Some choices are the same tokens to this model: it has no other words.")
    if _has_prefix(tokens):
        if eos is None:
            raise ScoringError(
                "One choice begins with another, and this model has no token that ends an answer."
            )
        tokens = [(*sequence, eos) for sequence in tokens]
    n_shared = _n_shared(tokens)
    if not n_shared:
        raise ScoringError("Nothing stands before the answer to predict it from.")
    endings = tuple(sequence[n_shared:] for sequence in tokens)
    starts = {ending[:-1] for ending in endings}
    runs = tuple(
        start
        for start in sorted(starts)
        if not any(other != start and other[: len(start)] == start for other in starts)
    )
    return Scoring(tokens[0][:n_shared], endings, runs)


def _has_prefix(sequences: Sequence[Tokens]) -> bool:
    """Whether one of the sequences begins another."""
    ordered = sorted(sequences)
    return any(b[: len(a)] == a for a, b in itertools.pairwise(ordered))


def _n_shared(sequences: Sequence[Tokens]) -> int:
    low, high = min(sequences), max(sequences)
    n = 0
    while n < min(len(low), len(high)) and low[n] == high[n]:
        n += 1
    return n


def cut_to_fit(
    row: Mapping[str, Any],
    field: str,
    n_max: int,
    count: Callable[[Mapping[str, Any]], int],
) -> dict[str, Any] | None:
    """Shorten one field until the row fits, cutting its end: between words where there are any.

    Parameters
    ----------
    row
        Fields of the prompt.
    field
        The one to cut.
    n_max
        Tokens that the model takes.
    count
        Tokens that a row needs, prompt and longest answer together.

    Returns
    -------
    dict or None
        The row with the longest beginning of the field that fits; None if nothing of it does.
    """
    text = as_text(row[field])
    low, high = 0, len(text)  # the most characters that fit lie in [low, high)
    while low + 1 < high:
        middle = (low + high) // 2
        fits = count({**row, field: text[:middle]}) <= n_max
        low, high = (middle, high) if fits else (low, middle)
    cut = text[:low]
    is_inside_word = bool(cut) and not (text[low].isspace() or cut[-1].isspace())
    if is_inside_word and len(words := cut.rsplit(maxsplit=1)) > 1:
        cut = cut[: len(cut) - len(words[-1])]  # not in the middle of a word
    cut = cut.rstrip()
    return {**row, field: cut} if cut and count({**row, field: cut}) <= n_max else None


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences of like length, longest first, capped by tokens after padding.

    Returns
    -------
    list of list of int
        Positions in `lengths`; each group's longest times its size is at most `max_tokens`,
        unless it holds a single sequence.

    Examples
    --------
    >>> batches_by_length([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups
