"""Whether a function fails on every row, judged by the first batches of its input.

A row that raises is no reason to end a job; nor is a bad file somewhere in it. A function of which
nothing has come but the same exception is: the mistake is most likely in the function.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

#: So many batches at the beginning of the input decide.
N_BATCHES = 3


class Failing(NamedTuple):
    """A part of the input in which no row succeeded, and all raised one type of exception.

    Attributes
    ----------
    n_batches
        Batches that it was computed in; 0 where it has no rows.
    kind
        The type of the exception; empty where there are no rows.
    """

    n_batches: int
    kind: str = ""


class FirstBatches:
    """Parts of an input, numbered in its order, that are known to fail.

    The parts may become known in any order. One that is not known, or in which a row succeeded, is
    not noted, and what comes after it decides nothing: a bad part late in the input ends no job.

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
        """Part `number` of the input, counted from 0, fails."""
        self._failing[number] = failing

    def is_hopeless(self, n_parts: int | None = None) -> bool:
        """Whether the first batches failed alike, or all of `n_parts` parts if they have fewer."""
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


#: Frames that are kept in mind where nothing tells that they are not computed any more.
_MAX_FRAMES = 100


class Position(NamedTuple):
    """Which partition of a frame a task computes."""

    frame: str
    number: int
    n_partitions: int


class Frames:
    """What is known of frames that are computed.

    Parameters
    ----------
    computation
        Returns an object that is another one for each time that a frame is computed; None where
        the frame is not computed any more.
    """

    def __init__(self, computation: Callable[[str], object | None]) -> None:
        self._computation = computation
        self._frames: dict[str, tuple[object, FirstBatches]] = {}

    def note(self, position: Position, failing: Failing) -> bool:
        """All rows of a partition failed; return whether that makes the computation hopeless."""
        frame, number, n_partitions = position
        self._forget()
        now = self._computation(frame)
        found = self._frames.get(frame)
        first = found[1] if found is not None else FirstBatches()
        self._frames[frame] = (now, first)
        first.note(number, failing)
        is_hopeless = first.is_hopeless(n_partitions)
        if is_hopeless:  # what comes of it afterwards begins anew
            del self._frames[frame]
        return is_hopeless

    def _forget(self) -> None:
        """Drop frames that are not computed any more, or are computed anew."""
        for frame, (then, _) in list(self._frames.items()):
            if self._computation(frame) is not then or len(self._frames) > _MAX_FRAMES:
                del self._frames[frame]
