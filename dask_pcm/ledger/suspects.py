"""Rows that cost worker processes, found by halving.

A row on which native code crashes, or that takes more memory than there is, ends the process that
computes it, and whoever takes the unit up next would do the same. What was in hand when a process
ended is a suspect. It is tried once more as it is; then in halves, of which each that costs another
process is halved at once, down to the row. A row that has cost two alone is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dask_pcm.ledger.ranges import Range

#: Processes that a batch, or a row alone, may cost before it is not tried again as it is.
N_TRIES = 2


class Cost(NamedTuple):
    """Rows of the input that were in hand when so many processes ended.

    Some of these were ended because a call took too long.
    """

    start: int
    stop: int
    n_processes: int
    n_late: int = 0


class Suspects:
    """Rows that have cost processes, and how they are tried again.

    Ranges may lie in each other, as halves do, and in any other way: a later run cuts its units
    and batches as it likes.
    """

    def __init__(self, costs: Iterable[Cost] = ()) -> None:
        self._costs: dict[Range, int] = {}
        self._late: dict[Range, int] = {}
        for start, stop, n_processes, n_late in costs:  # who took over may tell of the same
            self._costs[start, stop] = max(n_processes, self._costs.get((start, stop), 0))
            self._late[start, stop] = max(n_late, self._late.get((start, stop), 0))

    def __bool__(self) -> bool:
        return bool(self._costs)

    def __iter__(self) -> Iterator[Cost]:
        return (Cost(*rows, n, self._late.get(rows, 0)) for rows, n in sorted(self._costs.items()))

    def blame(self, rows: Range, is_late: bool = False) -> None:
        """One more process has ended with these rows in hand, perhaps as they took too long."""
        self._costs[rows] = self._costs.get(rows, 0) + 1
        self._late[rows] = self._late.get(rows, 0) + is_late

    def include(self, row: int) -> bool:
        return any(start <= row < stop for start, stop in self._costs)

    def end(self, start: int, n_rows: int, batch_rows: int) -> int:
        """Where a batch ends that begins with row `start`.

        Others come `n_rows` at a time; suspects by themselves, and at most `batch_rows`.

        >>> once = Suspects([Cost(32, 64, 1)])
        >>> once.end(0, 100, 32), once.end(32, 100, 32), once.end(64, 100, 32)
        (32, 64, 164)
        >>> Suspects([Cost(32, 64, 2)]).end(32, 100, 32)
        48
        >>> Suspects([Cost(32, 64, 2), Cost(32, 48, 1)]).end(32, 100, 32)
        40
        """
        around = [rows for rows in self._costs if rows[0] <= start < rows[1]]
        stop = start + n_rows
        if around:
            first, end = min(around, key=lambda rows: rows[1] - rows[0])
            n_tries = 1 if len(around) > 1 else N_TRIES  # one within another is a half of it
            is_halved = self._costs[first, end] >= n_tries
            size = (end - first + is_halved) // (1 + is_halved)
            stop = min(start + min(size, batch_rows), end)
        return min([stop, *(first for first, _ in self._costs if first > start)])

    def gives_up(self, row: int) -> bool:
        """Whether a row is not computed any more: alone, it has cost too much."""
        return self._costs.get((row, row + 1), 0) >= N_TRIES

    def is_late(self, row: int) -> bool:
        """Whether a row has taken too long, alone."""
        return self._late.get((row, row + 1), 0) > 0

    def given_up(self) -> list[int]:
        """All such rows, in their order."""
        return sorted({start for start, _ in self._costs if self.gives_up(start)})
