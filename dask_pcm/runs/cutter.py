"""Cuts what is left of a run into units."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from dask_pcm.ledger.parts import partition_name, range_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.parquet.reader import Span
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.units.graph import Unit, cut_to
from dask_pcm.scheduling.feed.sizes import cut_pieces


class Cutter:
    """Cuts what is left to do into units, in input order.

    Parameters
    ----------
    plan
        The frame.
    done_ranges, done_partitions
        Row ranges, or partitions, that have been committed.
    max_bytes
        Input that a unit of several pieces may have.
    """

    def __init__(
        self,
        plan: Plan,
        done_ranges: Sequence[Range] = (),
        done_partitions: frozenset[int] = frozenset(),
        max_bytes: int = 1 << 30,
    ) -> None:
        self._plan = plan
        self._max_bytes = max_bytes
        self._retries: list[Unit] = []
        #: Units cut so far, without those of `retry`.
        self.n_cut = 0
        self._order: list[int] | None = None  # of the plan's spans, by offset
        self._todo: list[tuple[int, Span | None]] = []  # (partition, rows), last first
        done = Ranges(done_ranges)
        if plan.spans is None:
            self._todo = [
                (index, None) for index in range(plan.n_partitions) if index not in done_partitions
            ]
        else:
            for index, span in enumerate(plan.spans):
                missing = cut_to(span, done)
                # A piece that can only be computed whole is not done until all of it is.
                if missing and not plan.is_splittable:
                    missing = [span]
                self._todo += [(index, rest) for rest in missing]
        self._todo.reverse()  # so that the next piece is at the end: popping it is cheap
        #: Rows left to be cut; partitions where rows are not known.
        self.n_rows = sum(1 if span is None else span.n_rows for _, span in self._todo)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to cut."""
        return not self._todo and not self._retries

    def retry(self, place: Range | int, failed: Sequence[int]) -> None:
        """Also cut the failed rows of a committed part, before anything else.

        Parameters
        ----------
        place
            The part's row range, or its partition.
        failed
            Numbers of the failed rows within the part. Where a part's rows are not those of its
            input (functions of partitions, filters), the whole part is computed again.
        """
        retry: tuple[int, ...] = ()
        if isinstance(place, int):
            unit = Unit(partition_name(place), place, None, None, retry=retry)
        else:
            partition, spans = self._spans_of(place)
            if self._plan.keeps_rows and failed:
                retry = tuple(failed)
                spans = list(_rows(spans, [place[0] + number for number in failed]))
            n_rows = sum(span.n_rows for span in spans)
            unit = Unit(range_name(*place), partition, tuple(spans), n_rows, retry=retry)
        self._retries.append(unit)
        self.n_rows += unit.n_rows or 1

    def _spans_of(self, place: Range) -> tuple[int, list[Span]]:
        """The rows of a part as spans, and the first partition that has some of them."""
        spans = self._plan.spans or []
        if self._order is None:  # input order differs from partition order once files were added
            self._order = sorted(range(len(spans)), key=lambda index: spans[index].offset)
        start, stop = place
        first = bisect.bisect_right(self._order, start, key=lambda index: spans[index].offset) - 1
        found = []
        for index in self._order[first:]:
            span = spans[index]
            if span.offset >= stop:
                break
            inside = max(start - span.offset, 0), min(stop - span.offset, span.n_rows)
            if inside[0] < inside[1]:
                found.append(span.cut(*inside))
        return self._order[first], found

    def cut(self, n_rows: int) -> Unit:
        """Cut the next unit: about `n_rows` rows of one piece or several, or a partition.

        See ``cut_pieces`` for the number of rows.
        """
        if self._retries:
            unit = self._retries.pop()
            self.n_rows -= unit.n_rows or 1
            return unit
        partition, span = self._todo.pop()
        number, self.n_cut = self.n_cut, self.n_cut + 1
        if span is None:
            self.n_rows -= 1
            return Unit(partition_name(partition), partition, None, None, number=number)
        spans = [span]
        if self._plan.is_splittable:
            self._todo.append((partition, span))
            taken = cut_pieces(self._ahead(), max(1, n_rows), self._plan.batch_rows)
            spans = [self._take(n) for n in taken]
        total = sum(s.n_rows for s in spans)
        self.n_rows -= total
        end = spans[-1].offset + spans[-1].n_rows
        name = range_name(spans[0].offset, end)
        return Unit(name, partition, tuple(spans), total, number=number)

    def _ahead(self) -> Iterator[int]:
        """Rows of the pieces that one unit may take: neighbours, together below `max_bytes`."""
        end, n_bytes = None, 0
        for _, span in reversed(self._todo):
            if span is None or (end is not None and span.offset != end):
                return
            if n_bytes and n_bytes + span.n_bytes > self._max_bytes:
                return
            yield span.n_rows
            end, n_bytes = span.offset + span.n_rows, n_bytes + span.n_bytes

    def _take(self, n_rows: int) -> Span:
        """Take rows off the next piece."""
        partition, span = self._todo.pop()
        assert span is not None
        if n_rows == span.n_rows:
            return span
        self._todo.append((partition, span.cut(n_rows, span.n_rows)))
        return span.cut(0, n_rows)


def _rows(spans: Sequence[Span], numbers: Sequence[int]) -> Iterator[Span]:
    """Spans of the rows with these sorted numbers; adjacent rows share a span."""
    at = 0
    for span in spans:
        first, end = span.offset, span.offset + span.n_rows
        while at < len(numbers) and numbers[at] < end:
            start = numbers[at]
            stop = start + 1
            at += 1
            while at < len(numbers) and numbers[at] == stop < end:
                stop, at = stop + 1, at + 1
            yield span.cut(start - first, stop - first)
