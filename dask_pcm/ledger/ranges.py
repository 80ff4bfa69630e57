"""Ranges of rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

#: First row, and the one after the last.
Range = tuple[int, int]


class Ranges:
    """Rows, as ranges that may overlap."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._ranges: list[Range] = []
        for start, stop in sorted(pair for pair in ranges if pair[0] < pair[1]):
            if self._ranges and start <= self._ranges[-1][1]:
                start, last = self._ranges.pop()
                stop = max(stop, last)
            self._ranges.append((start, stop))
        self._starts = [start for start, _ in self._ranges]

    def __iter__(self) -> Iterator[Range]:
        """As few ranges as there can be, in their order."""
        return iter(self._ranges)

    @property
    def n_rows(self) -> int:
        return sum(stop - start for start, stop in self._ranges)

    def missing(self, start: int, stop: int) -> Iterator[Range]:
        """What these lack of the rows `start` to `stop`.

        >>> list(Ranges([(2, 4), (6, 9)]).missing(0, 8))
        [(0, 2), (4, 6)]
        """
        index = max(0, bisect.bisect_right(self._starts, start) - 1)
        for first, end in self._ranges[index:]:
            if first >= stop:
                break
            if first > start:
                yield start, first
            start = max(start, end)
        if start < stop:
            yield start, stop
