"""What an engine computes of a row: scores of endings, new tokens, or a vector."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.engine.slabs import Place
from dask_pcm.inference.engine.timeslice import UNKNOWN, Owner

#: Called once with the result of a row, or with what it has failed with.
Done = Callable[[Any], None]


NOT_A_NUMBER = "The model's output for the row is not a number (NaN)."


class RowError(Exception):
    """A row cannot be computed; the message becomes the row's error."""


@dataclass(slots=True, eq=False)
class Row:
    """A row in an engine.

    Attributes
    ----------
    tokens
        Ids of what is computed: its prompt, and what was generated so far.
    done
        Is told the result.
    prefix
        The prefix that it shares with others, if any.
    pages, n_done
        Its pages, and for how many of its tokens they hold keys and values.
    owner
        Who is served by it.
    n_shared
        How many of its pages, the first ones, are those of its prefix.
    copies, n_clean
        Where its other pages are off the device; and how many of these copies still hold what the
        pages do. Without `pages`, all that it has stored is there.
    n_out
        How many pages, the first ones, have only a copy, while `pages` are those after them: the
        device has no room for all (``long_context.py``).
    n_lacking, lacks_since
        For how many pages of it there is no memory at all, and since when no more has come, by the
        monotonic clock.
    """

    tokens: list[int]
    done: Done = lambda result: None
    prefix: Prefix | None = None
    pages: list[int] = field(default_factory=list)
    n_done: int = 0
    owner: Owner = UNKNOWN
    n_shared: int = 0
    copies: list[Place] = field(default_factory=list)
    n_clean: int = 0
    n_out: int = 0
    n_lacking: int = 0
    lacks_since: float = 0.0

    @property
    def n_left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.tokens) - self.n_done

    @property
    def n_expected(self) -> int:
        """Tokens for which it is expected to run; those with more go first."""
        return 0

    @property
    def is_parked(self) -> bool:
        """Whether what it has stored is off the device."""
        return bool(self.n_done and not self.pages)


@dataclass(slots=True, eq=False)
class Prefix(Row):
    """A beginning that rows share; computed once, and kept while there is room.

    Attributes
    ----------
    n_users
        Rows that have not ended.
    used_at
        The step in which a row needed it last.
    """

    n_users: int = 0
    used_at: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether its keys and values are there, on the device or off it."""
        return self.n_done == len(self.tokens)

    def outward(self) -> Iterator[Prefix]:
        """It, and those within which it lies."""
        found: Prefix | None = self
        while found is not None:
            yield found
            found = found.prefix

    def first_lacking(self) -> Prefix:
        """The outermost of those within which it lies that is not there yet."""
        found = self
        while found.prefix is not None and not found.n_done and not found.prefix.is_ready:
            found = found.prefix
        return found


@dataclass(frozen=True, slots=True)
class Trie:
    """Tokens of alternative endings; those that begin alike share tokens.

    Attributes
    ----------
    tokens, depths, parents
        Ids, places after the prompt, and the index of the token before each; -1 for the prompt.
    wanted
        By ending, pairs of the index after which a token is predicted (-1: after the prompt) and
        the token.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    parents: tuple[int, ...]
    wanted: tuple[tuple[tuple[int, int], ...], ...]


@functools.lru_cache(maxsize=1024)
def trie_of(endings: tuple[tuple[int, ...], ...]) -> Trie:
    """Merge endings into a trie; last tokens are predicted only, and not computed.

    Examples
    --------
    >>> trie = trie_of(((5, 6, 7), (5, 8), (9,)))
    >>> trie.tokens, trie.depths, trie.parents
    ((5, 6), (0, 1), (-1, 0))
    >>> trie.wanted
    (((-1, 5), (0, 6), (1, 7)), ((-1, 5), (0, 8)), ((-1, 9),))
    """
    index: dict[tuple[int, ...], int] = {(): -1}
    tokens: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    for ending in endings:
        for depth in range(len(ending) - 1):
            start = tuple(ending[: depth + 1])
            if start not in index:
                index[start] = len(tokens)
                tokens.append(start[-1])
                depths.append(depth)
                parents.append(index[start[:-1]])
    wanted = tuple(
        tuple((index[tuple(ending[:depth])], token) for depth, token in enumerate(ending))
        for ending in endings
    )
    return Trie(tuple(tokens), tuple(depths), tuple(parents), wanted)


@dataclass(slots=True, eq=False)
class Scored(Row):
    """A row of which endings are scored; its result is a list of log-probabilities.

    Attributes
    ----------
    trie
        The endings.
    """

    trie: Trie = field(kw_only=True)

    @property
    def n_left(self) -> int:
        """Tokens that are not computed yet, those of the endings included."""
        return len(self.tokens) - self.n_done + len(self.trie.tokens)


@dataclass(slots=True, eq=False)
class Generated(Row):
    """A row that is continued; its result is the list of new tokens.

    Attributes
    ----------
    n_prompt
        Tokens of its prompt.
    n_max
        New tokens at most.
    stops
        Tokens that end it; they are not part of the result.
    sampling, number
        How tokens are chosen, and the stable id of the row.
    is_over
        Says of the new tokens whether they are enough, for instance at a stop string.
    key
        Names its new tokens in drafts (``Drafting``); equal for rows that get the same tokens.
    on_token
        Is told each new token, on the engine's thread.
    n_turns, began_at, waits_since
        See ``timeslice.Turns``.
    n_charged
        Tokens of the prompt that count as served.
    """

    n_prompt: int = field(kw_only=True)
    n_max: int = field(kw_only=True)
    stops: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    number: int = 0
    is_over: Callable[[Sequence[int]], bool] | None = None
    key: int | None = None
    on_token: Callable[[int], None] | None = None
    n_turns: int = 0
    began_at: int = 0
    waits_since: int = 0
    n_charged: int = 0

    @property
    def n_expected(self) -> int:
        """Tokens that it takes at most from now on."""
        return self.n_prompt + self.n_max - self.n_done

    @property
    def new(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[self.n_prompt :]

    def resume(self, draft: Sequence[int]) -> None:
        """Go on after tokens of an earlier attempt; the one that ends the row is left out."""
        new = list(draft[: self.n_max - 1])
        while new and self.is_over is not None and self.is_over(new):
            new.pop()
        self.tokens += new

    def append(self, token: int) -> bool:
        """Add a new token; return whether the row is over."""
        if token in self.stops:
            return True
        self.tokens.append(token)
        if self.on_token is not None:
            self.on_token(token)
        if len(self.tokens) - self.n_prompt >= self.n_max:
            return True
        return self.is_over is not None and self.is_over(self.new)


class Pooling(Enum):
    """How the hidden states of a text's tokens become one: their mean, the first, or the last."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"

    def kept(self, n_tokens: int) -> range:
        """The tokens of a text whose hidden states have the vector as their mean.

        Examples
        --------
        >>> [list(one.kept(3)) for one in Pooling]
        [[0, 1, 2], [0], [2]]
        """
        at = {"mean": (0, n_tokens), "cls": (0, 1), "last": (n_tokens - 1, n_tokens)}[self.value]
        return range(*at)


@dataclass(slots=True, eq=False)
class Embedded(Row):
    """A row whose result is a vector: the pooled hidden states of its tokens, in float32."""

    pooling: Pooling = field(kw_only=True)
