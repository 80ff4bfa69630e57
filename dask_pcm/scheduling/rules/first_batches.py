"""A function is taken to fail on every row if the first batches of its input all fail alike.

Single rows that raise do not end a run, and neither does a bad file somewhere in the input. If
every row so far raised the same type of exception, the bug is most likely in the function.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

#: Batches at the beginning of the input that decide.
N_BATCHES = 3


class Failing(NamedTuple):
    """A part of the input in which every row raised the same type of exception.

    Attributes
    ----------
    n_batches
        Batches of the part; 0 if it has no rows.
    kind
        Type of the exception; empty if the part has no rows.
    """

    n_batches: int
    kind: str = ""


class FirstBatches:
    """The failing parts of one input, numbered in input order.

    Parts may be noted in any order. A part that is unknown, or in which a row succeeded, is not
    noted; the parts after it then decide nothing. A bad part late in the input thus ends no run.

    >>> first = FirstBatches()
    >>> first.note(1, Failing(2, "ValueError"))
    >>> first.is_hopeless()
    False
    >>> first.note(0, Failing(1, "ValueError"))
    >>> first.is_hopeless()
    True
    """

    def __init__(self) -> None:
        self._failing: dict[int, Failing] = {}

    def note(self, number: int, failing: Failing) -> None:
        """Record that part `number` of the input, counted from 0, fails."""
        self._failing[number] = failing

    def is_hopeless(self, n_parts: int | None = None) -> bool:
        """Whether the first ``N_BATCHES`` batches failed alike; or all, if `n_parts` have fewer."""
        n_batches = 0
        kinds: set[str] = set()
        for number in count():
            if number == n_parts:
                return n_batches > 0
            if (failing := self._failing.get(number)) is None:
                return False
            if failing.n_batches:
                n_batches += failing.n_batches
                kinds.add(failing.kind)
            if len(kinds) > 1:
                return False
            if n_batches >= N_BATCHES:
                return True
        raise AssertionError


#: Frames kept at most, in case `computation` never reports their end.
_MAX_FRAMES = 100


class Position(NamedTuple):
    """Which partition of a frame a task computes."""

    frame: str
    number: int
    n_partitions: int


class Frames:
    """First batches of each frame that is being computed.

    Parameters
    ----------
    computation
        Returns a token for the current computation of a frame, compared by identity; None if the
        frame is not being computed. A new token means a new computation, which starts afresh.
    """

    def __init__(self, computation: Callable[[str], object | None]) -> None:
        self._computation = computation
        self._frames: dict[str, tuple[object, FirstBatches]] = {}

    def note(self, position: Position, failing: Failing) -> bool:
        """Record that all rows of a partition failed; return whether the input is hopeless."""
        frame, number, n_partitions = position
        self._forget()
        now = self._computation(frame)
        found = self._frames.get(frame)
        first = found[1] if found is not None else FirstBatches()
        self._frames[frame] = (now, first)
        first.note(number, failing)
        is_hopeless = first.is_hopeless(n_partitions)
        if is_hopeless:  # tasks still in flight must not fail the next computation
            del self._frames[frame]
        return is_hopeless

    def _forget(self) -> None:
        """Drop frames whose computation has ended or was replaced, and any beyond the limit."""
        for frame, (then, _) in list(self._frames.items()):
            if self._computation(frame) is not then or len(self._frames) > _MAX_FRAMES:
                del self._frames[frame]
