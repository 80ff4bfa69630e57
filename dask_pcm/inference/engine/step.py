"""A step of an engine, as far as it is chosen, and the rows from which it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dask_pcm.inference.engine.parts import Part
from dask_pcm.inference.engine.rows import Embedded, Row

#: A step has no more of a client's rows of a kind once as many have not fitted.
_MOST_MISSES = 64


@dataclass(slots=True)
class Step:
    """What a step computes, as far as it is chosen.

    Attributes
    ----------
    left
        Tokens for which there is room.
    n_kept
        Logits that are kept.
    """

    budget_tokens: int
    left: int
    parts: list[Part] = field(default_factory=list)
    n_kept: int = 0

    def add(self, part: Part, n_tokens: int) -> None:
        """Compute a part of as many tokens, too."""
        self.parts.append(part)
        self.left -= n_tokens
        if part.kept and not isinstance(part.row, Embedded):  # what is limited are logits
            self.n_kept += len(part.kept)


class Candidates:
    """A client's rows in a step, the most urgent first: a list of each kind.

    Attributes
    ----------
    n_misses
        Rows of this kind for which there was no room.
    n_prompt, n_output
        Tokens that the step computes of them and that are not charged yet.
    """

    def __init__(self, lists: Iterable[Iterable[Row]], is_running: Callable[[Row], bool]) -> None:
        self._lists = [iter(one) for one in lists]
        self._is_running = is_running
        self.n_misses = self.n_prompt = self.n_output = 0

    def next(self) -> Row | None:
        """The next row; None if there is none. After too many misses, only rows that run."""
        while self._lists:
            for row in self._lists[0]:
                if self.n_misses < _MOST_MISSES or self._is_running(row):
                    return row
            del self._lists[0]
            self.n_misses = 0
        return None
