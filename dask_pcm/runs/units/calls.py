"""What an attempt notes of its calls, in the unit's journal and in the log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from distributed import Reschedule

from dask_pcm.errors import FencedError
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.journal.writer import Journal
from dask_pcm.ledger.log import note_called
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.ranges import Range
from dask_pcm.plugins.worker.task import stops_at
from dask_pcm.runs.units.compute import Batch
from dask_pcm.runs.units.graph import Unit
from dask_pcm.runs.units.pace import Pace


class Calls:
    """Records the rows that the function is called on, before each call.

    In the unit's journal, and at the end in the log. Without a journal, in the log at once, for the
    whole unit: it is a single batch, or in an object store, which counts calls by the unit. There,
    a journal is begun once there are drafts.
    """

    def __init__(
        self,
        output: Output,
        unit: Unit,
        journal: Journal | None,
        drafts: Mapping[int, Sequence[int]],
        begin_journal: Callable[[], Journal],
    ) -> None:
        #: Of each draft, how much of it is journalled.
        self._n_kept = {key: len(draft) for key, draft in drafts.items()}
        self._output = output
        self._unit = unit
        self._journal = journal
        self._begin_journal = begin_journal
        #: Whether the journal was begun for drafts: calls are in the log already.
        self._is_for_drafts = False
        self._begun: dict[Range, None] = {}
        self._called: list[Range] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._journal is not None and self._is_for_drafts:
            self._journal.close()
        elif self._journal is not None:
            with contextlib.suppress(FencedError):  # a fenced run's calls are not counted
                note_called(self._output, self._called, self._journal.name, self._output.run)

    def begin(self, batch: Batch, pace: Pace) -> BatchCalls:
        """Record that a batch is begun; return what is told of its calls."""
        self._begun[batch.start, batch.stop] = None
        if self._journal is not None:
            waits = batch.is_ready and not self._is_for_drafts
            self._journal.begin(batch.start, batch.stop, waits=waits)
        return BatchCalls(self, batch, pace)

    def finish(self, record: Record) -> None:
        """Record that a batch is finished."""
        self._begun.pop((record.start, record.stop), None)
        if self._journal is not None:
            self._journal.append(record)

    def keep(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Record what rows in flight have by now, as far as that is new."""
        more = {key: draft[self._n_kept.get(key, 0) :] for key, draft in drafts.items()}
        more = {key: draft for key, draft in more.items() if draft}
        if more:
            self._journal_of_drafts().keep(more)
            self._n_kept.update((key, len(drafts[key])) for key in more)

    def _journal_of_drafts(self) -> Journal:
        """The journal, which is begun with what is in flight if there is none."""
        if self._journal is None:
            self._journal, self._is_for_drafts = self._begin_journal(), True
            self._journal.settle([], [])
            for rows in self._begun:
                self._journal.begin(*rows)
        return self._journal

    def on_wait(self, rows: Range) -> None:
        """Rows wait for a context."""
        if self._journal is not None and not self._is_for_drafts:
            self._journal.wait(*rows)

    def on_call(self, rows: Range) -> None:
        """A function is called on rows."""
        if self._journal is not None and not self._is_for_drafts:
            self._journal.call(*rows)
            self._called.append(rows)
        elif not self._called:
            self._called = [(s.offset, s.offset + s.n_rows) for s in self._unit.spans or ()]
            note_called(self._output, self._called, None, self._output.run)


class BatchCalls:
    """Passes on what happens to the rows of one batch; a ``Watch``."""

    def __init__(self, calls: Calls, batch: Batch, pace: Pace) -> None:
        self._calls = calls
        self._pace = pace
        self._is_called = False
        self._rows = batch.start, batch.stop
        self._waits = batch.is_ready  # recorded when the batch was begun

    def waits(self) -> None:
        """The batch waits for a context."""
        if not self._waits:
            self._calls.on_wait(self._rows)
        self._waits = False

    def calls(self, start: int, stop: int, n_rows: int) -> None:
        """A function is called on some of its rows."""
        if not self._is_called:  # it may have waited for its turn for long
            stop_in_time(self._pace)
        self._is_called = True
        first, end = self._rows
        # With a filter below, it is not known which rows of the input these are.
        is_known = n_rows == end - first
        self._calls.on_call((first + start, first + stop) if is_known else self._rows)


def stop_in_time(pace: Pace) -> None:
    """Raise Reschedule if the worker is about to end, and a batch would not be done by then."""
    if time.monotonic() + pace.batch_s > stops_at():
        raise Reschedule
