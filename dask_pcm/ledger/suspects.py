"""Rows that end worker processes, isolated by bisection.

A row on which native code crashes, or that needs more memory than there is, ends the process that
computes it, and would end that of every later attempt. Rows that were in flight when a process
ended are suspects. A batch of suspects is retried once as it is, then in halves. A half that ends
another process is halved at once, down to the row. A row that has ended two processes alone is
given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dask_pcm.ledger.ranges import Range

#: Processes that a batch, or a row alone, may cost before it is not retried as it is.
N_TRIES = 2


class Cost(NamedTuple):
    """Number of processes that ended while these input rows were in flight.

    `n_late` of them were ended because a call exceeded ``batch_timeout``.
    """

    start: int
    stop: int
    n_processes: int
    n_late: int = 0


class Suspects:
    """Rows that have cost processes, and how they are retried.

    Ranges may contain each other, as halves do, or overlap in any other way: a later run may cut
    units and batches of other sizes.
    """

    def __init__(self, costs: Iterable[Cost] = ()) -> None:
        self._costs: dict[Range, int] = {}
        self._late: dict[Range, int] = {}
        # Costs are totals that each attempt copies into its own journal. So two journals may tell
        # of the same deaths, and the larger total includes the other.
        for start, stop, n_processes, n_late in costs:
            self._costs[start, stop] = max(n_processes, self._costs.get((start, stop), 0))
            self._late[start, stop] = max(n_late, self._late.get((start, stop), 0))

    def __bool__(self) -> bool:
        return bool(self._costs)

    def __iter__(self) -> Iterator[Cost]:
        return (Cost(*rows, n, self._late.get(rows, 0)) for rows, n in sorted(self._costs.items()))

    def blame(self, rows: Range, is_late: bool = False) -> None:
        """Count one more process that ended with these rows in flight.

        With `is_late` it was ended because the call exceeded ``batch_timeout``.
        """
        self._costs[rows] = self._costs.get(rows, 0) + 1
        self._late[rows] = self._late.get(rows, 0) + is_late

    def include(self, row: int) -> bool:
        """Whether a row is a suspect."""
        return any(start <= row < stop for start, stop in self._costs)

    def end(self, start: int, n_rows: int, batch_rows: int) -> int:
        """Where a batch that begins with row `start` ends.

        Other rows come `n_rows` at a time. Suspects are not mixed with others, and come
        `batch_rows` at a time at most.

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
            # Of ranges within each other, the narrowest was found last.
            first, end = min(around, key=lambda rows: rows[1] - rows[0])
            # A range within another is a half of it: the wider one has had the retry already, which
            # is there for losses that have nothing to do with the rows.
            n_tries = 1 if len(around) > 1 else N_TRIES
            is_halved = self._costs[first, end] >= n_tries
            # Halves are rounded up, so that half of a single row is that row.
            size = (end - first + is_halved) // (1 + is_halved)
            stop = min(start + min(size, batch_rows), end)
        return min([stop, *(first for first, _ in self._costs if first > start)])

    def gives_up(self, row: int) -> bool:
        """Whether a row is not computed any more: alone, it has cost `N_TRIES` processes."""
        return self._costs.get((row, row + 1), 0) >= N_TRIES

    def is_late(self, row: int) -> bool:
        """Whether a row has exceeded ``batch_timeout``, alone."""
        return self._late.get((row, row + 1), 0) > 0

    def given_up(self) -> list[int]:
        """Rows that are given up, sorted."""
        return sorted({start for start, _ in self._costs if self.gives_up(start)})
