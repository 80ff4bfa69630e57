"""Sets of rows, as ranges."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

#: First row, and the one after the last.
Range = tuple[int, int]


class Ranges:
    """A set of rows, made from ranges that may overlap."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        # Invariant: sorted, none empty, and neither overlapping nor adjacent.
        self._ranges: list[Range] = []
        for start, stop in sorted(pair for pair in ranges if pair[0] < pair[1]):
            if self._ranges and start <= self._ranges[-1][1]:
                start, last = self._ranges.pop()
                stop = max(stop, last)
            self._ranges.append((start, stop))
        self._starts = [start for start, _ in self._ranges]

    def __iter__(self) -> Iterator[Range]:
        """The fewest ranges with these rows, sorted."""
        return iter(self._ranges)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self._ranges)

    def missing(self, start: int, stop: int) -> Iterator[Range]:
        """Ranges of the rows `start` to `stop` that are not in this set.

        >>> list(Ranges([(2, 4), (6, 9)]).missing(0, 8))
        [(0, 2), (4, 6)]
        """
        # Bisected, as a recovery asks once per record, and an output may have very many parts.
        index = max(0, bisect.bisect_right(self._starts, start) - 1)
        for first, end in self._ranges[index:]:
            if first >= stop:
                break
            if first > start:
                yield start, first
            start = max(start, end)
        if start < stop:
            yield start, stop
