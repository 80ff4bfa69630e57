"""Whose tokens an engine computes next: fair by class and client first, then by request.

Pure: tokens in, an order out. Each client has a virtual token counter, after Sheng et al.,
"Fairness in Serving Large Language Models" (OSDI 2024): the tokens that it was served, over its
weight; the client with the least is next. Idle time earns no credit: a client that comes back is
lifted to the least served of those that are there. Classes share in the same way, above clients.

Below a client, questions take turns in slices, as in the fair scheduler of Vijaya Kumar et al.,
"AQUA: Network-Accelerated Memory Offloading for LLMs in Scale-Up GPU Domains" (ASPLOS 2025): the
least served goes first, so a new one at once. Rows of a batch take no turns.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)

#: Tokens of a slice. Measured: with 16 to 32, new questions begin at once and little is paged.
SLICE_TOKENS = 16
#: What a token counts: those that are generated take a step each, those of prompts share steps.
_PROMPT_WEIGHT, _OUTPUT_WEIGHT = 1.0, 2.0
#: Slices after which a question that waits goes before new ones.
_PATIENCE_SLICES = 16


class Kind(Enum):
    """Classes of rows: questions, whose answers are waited for, and rows of batches."""

    QUESTION = "question"
    BATCH = "batch"


#: The share of tokens of a class, where both have enough to do for long.
WEIGHTS: Mapping[Kind, float] = {Kind.QUESTION: 8.0, Kind.BATCH: 1.0}
#: Tokens by which questions may be ahead of their share: as many as a burst of them has.
_AHEAD: Mapping[Kind, float] = {Kind.QUESTION: 4096.0, Kind.BATCH: 0.0}


@dataclass(frozen=True, slots=True)
class Owner:
    """Who is served: a client, in a class."""

    kind: Kind = Kind.BATCH
    client: str = ""


#: Rows of batches of which no client is known.
UNKNOWN = Owner()


class Counters(Generic[K]):
    """Virtual token counters of those who share.

    Examples
    --------
    >>> counters = Counters()
    >>> counters.begin("a")
    >>> counters.charge("a", 100)
    >>> counters.begin("b")  # no credit for the time before
    >>> counters["b"]
    100.0
    """

    def __init__(self) -> None:
        self._served: dict[K, float] = {}
        self._n_open: dict[K, int] = {}
        #: The counter of the last one that left, while no one is there.
        self._last = 0.0

    def __getitem__(self, name: K) -> float:
        return self._served[name]

    def begin(self, name: K) -> None:
        """One more request of `name`; with its first one it comes back."""
        if name not in self._n_open:
            least = min((self._served[one] for one in self._n_open), default=self._last)
            self._served[name] = max(least, self._served.get(name, 0.0))
            # Those who left, and whom a return would lift as high, need not be remembered.
            for one in [one for one in self._served if one not in self._n_open and one != name]:
                if self._served[one] <= least:
                    del self._served[one]
        self._n_open[name] = self._n_open.get(name, 0) + 1

    def end(self, name: K) -> None:
        """A request of `name` has ended."""
        self._n_open[name] -= 1
        if not self._n_open[name]:
            del self._n_open[name]
            self._last = self._served[name]

    def charge(self, name: K, tokens: float) -> None:
        """`name` was served as many tokens, over its weight."""
        self._served[name] += tokens

    def validate(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        assert all(n > 0 for n in self._n_open.values())
        assert self._n_open.keys() <= self._served.keys()


class Turns(Protocol):
    """What of a row says whether it is its turn.

    Attributes
    ----------
    owner
        Who is served by it.
    n_turns
        Steps that have computed some of it for the first time.
    began_at
        Its place among all rows, in the order in which they came.
    waits_since
        The step since which it waits, see ``TimeSlices.served_at``.
    """

    owner: Owner
    n_turns: int
    began_at: int
    waits_since: int


class TimeSlices:
    """Orders the rows of an engine.

    Parameters
    ----------
    slice_tokens
        Tokens of a slice, at least 1.
    weights
        Of classes.

    Raises
    ------
    ValueError
        If a slice has no token.
    """

    def __init__(
        self, slice_tokens: int = SLICE_TOKENS, weights: Mapping[Kind, float] = WEIGHTS
    ) -> None:
        if slice_tokens < 1:
            raise ValueError(f"A slice has 1 token at least; found {slice_tokens}.")
        self.slice_tokens = slice_tokens
        self._weights = weights
        self._kinds: Counters[Kind] = Counters()
        #: By class: each is served at a rate of its own.
        self._clients: dict[Kind, Counters[Owner]] = {kind: Counters() for kind in Kind}

    def begin(self, owner: Owner) -> None:
        """A row has come."""
        self._kinds.begin(owner.kind)
        self._clients[owner.kind].begin(owner)

    def end(self, owner: Owner) -> None:
        """A row has left."""
        self._kinds.end(owner.kind)
        self._clients[owner.kind].end(owner)

    def charge(self, owner: Owner, n_prompt: int, n_output: int) -> None:
        """Tokens of a row are computed."""
        tokens = _PROMPT_WEIGHT * n_prompt + _OUTPUT_WEIGHT * n_output
        self._kinds.charge(owner.kind, tokens / self._weights[owner.kind])
        self._clients[owner.kind].charge(owner, tokens)

    def place(self, owner: Owner) -> tuple[float, bool, float, str]:
        """Sort key of those who share: the least served class first, then its least served client.

        Questions go first among equals.
        """
        kind, is_batch = self._kinds[owner.kind] - self._ahead(owner), owner.kind is Kind.BATCH
        return kind, is_batch, self.served(owner), owner.client

    def served(self, owner: Owner) -> float:
        """A client's virtual token counter."""
        return self._clients[owner.kind][owner]

    def next_of(self, owners: Iterable[Owner]) -> Owner:
        """Who is next of several."""
        return min(owners, key=self.place)

    def n_slices(self, row: Turns) -> int:
        """Slices that a row has had; none for rows of batches, which take no turns."""
        return row.n_turns // self.slice_tokens if row.owner.kind is Kind.QUESTION else 0

    def turn(self, row: Turns, now: int) -> tuple[int, int]:
        """Sort key of a client's questions at step `now`: the fewest slices, then who came first.

        One that has waited for long goes before all: new ones could keep it out for ever.
        """
        is_late = now - row.waits_since > _PATIENCE_SLICES * self.slice_tokens
        return -1 if is_late else self.n_slices(row), row.began_at

    def served_at(self, row: Turns, now: int) -> int:
        """Since when a row waits that is computed at step `now`.

        A step makes up for some that it has waited, so that one that is late has a slice.
        """
        return min(now, row.waits_since + _PATIENCE_SLICES)

    def may_displace(self, row: Turns, other: Turns, now: int) -> bool:
        """Whether `row`, which waits, may have the memory of `other`, which does not.

        A client's questions take turns of a slice. Between clients, and between classes, a slice
        apart is fair; only a new question does not wait for as much.
        """
        is_question = row.owner.kind is Kind.QUESTION
        if row.owner == other.owner:
            return is_question and self.turn(row, now)[0] < self.turn(other, now)[0]
        if row.owner.kind is other.owner.kind:
            apart = self.served(other.owner) - self.served(row.owner)
        else:
            kinds = [self._kinds[one.owner.kind] - self._ahead(one.owner) for one in (row, other)]
            apart = kinds[1] - kinds[0]
        is_new = is_question and not row.n_turns
        return apart >= (0 if is_new else _OUTPUT_WEIGHT * self.slice_tokens)

    def _ahead(self, owner: Owner) -> float:
        return _AHEAD[owner.kind] / self._weights[owner.kind]

    def validate(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        self._kinds.validate()
        for counters in self._clients.values():
            counters.validate()
