"""An attempt at a unit by rows: batch by batch, each journalled when it is finished.

Journalled rows survive the process. The next attempt at the unit takes them over; a later run
commits them as they are (``recover.py``).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import heapq
import logging
import math
import operator
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import pyarrow as pa
from distributed import Reschedule

from dask_pcm.errors import FencedError, LostProcessError, OutputError
from dask_pcm.frames.caller import Submission
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.journal.writer import Journal
from dask_pcm.ledger.log import note_called
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.suspects import N_TRIES, Suspects
from dask_pcm.ledger.unit_journals import begin_journal
from dask_pcm.plugins.worker.deadline import in_time, ruled
from dask_pcm.plugins.worker.task import hand_over, stops_at, was_lost
from dask_pcm.runs.units.compute import Batch, Computation, Outcome
from dask_pcm.runs.units.graph import Unit, cut_to
from dask_pcm.runs.units.history import History, suspects_of
from dask_pcm.runs.units.pace import Pace
from dask_pcm.runs.units.schema import GROUP_BYTES, PartSchema
from dask_pcm.runs.units.unit import UnitSpec

logger = logging.getLogger(__name__)

#: Errors of each batch that are reported.
MAX_ERRORS = 3
#: Rows in succession that are given up before the run ends; fewer if no row ever succeeded.
_HOPELESS_ROWS, _HOPELESS_FIRST_ROWS = 25, 5


def attempt(
    unit: Unit, computation: Computation, spec: UnitSpec, origin: Mapping[str, Any]
) -> Generator[Record, None, None]:
    """Rows of a unit in input order: those that earlier attempts had finished, and the rest.

    Rows are journalled before they are yielded, and stay so until ``clear_journals``. Rows that
    ended their process are tried alone, and fail after ``N_TRIES`` (see ``suspects.py``).

    Parameters
    ----------
    origin
        What a part made of the journal says of its origin.

    Raises
    ------
    LostProcessError
        Row after row ends its process.
    """
    output = spec.output
    # With a timeout, each call is journalled before it begins: it may be the one that hangs.
    shortest = spec.batch_rows if spec.timeout_s is None else 0
    history = History.of(unit, output, shortest)
    kept, suspects = history.records, suspects_of(unit, history, spec.costs)
    done = Ranges((record.start, record.stop) for record in kept)
    spans = [left for span in unit.spans or () for left in cut_to(span, done)]
    with ExitStack() as stack:
        journal = None
        is_long = sum(span.n_rows for span in spans) > shortest
        if kept or suspects or (output.storage.has_journals and is_long):
            journal = begin_journal(output, unit.name, origin)
            stack.callback(journal.close)
        calls = stack.enter_context(_Calls(output, unit, journal))
        if journal is not None:
            journal.settle(history.journals, list(suspects))
            for record in kept:
                journal.append(record)
        for name in history.journals:  # only now that ours has all that they had
            output.storage.remove(name)
        _raise_if_hopeless(unit, suspects, functools.partial(_has_answers, output, kept))
        stack.enter_context(ruled(spec.timeout_s, None if journal is None else journal.descriptor))
        stack.push(computation.close)  # with the exception, which may be the device's end
        pace = Pace(spec.batch_rows, suspects)
        left = replace(unit, spans=tuple(spans))
        # After a loss the cause may be what lies below the function: then only rows that are
        # journalled as begun are computed.
        todo = computation.batches(left, spec.max_bytes, pace.end, not was_lost()) if spans else ()
        flight = _Flight(computation, spec, calls, pace)
        fresh = flight.records(todo)
        by_row = operator.attrgetter("start")
        yield from heapq.merge(kept, fresh, key=by_row) if kept else fresh


def _has_answers(output: Output, kept: Iterable[Record]) -> bool:
    """Whether any row of the job has succeeded, in this unit or in a part."""
    if any(record.stop - record.start > record.n_failed for record in kept):
        return True
    for name in output.parts():
        with contextlib.suppress(FileNotFoundError, OutputError):
            note = output.read_note(name)
            if note.get("rows", 0) > note.get("failed", 0):
                return True
    return False


def _raise_if_hopeless(unit: Unit, suspects: Suspects, has_answers: Callable[[], bool]) -> None:
    """End a run where row after row ends its process: the rows are not the cause then."""
    n_rows = 0
    for row in suspects.given_up():
        n_rows = n_rows + 1 if suspects.gives_up(row - 1) else 1
        if n_rows == _HOPELESS_ROWS or (n_rows == _HOPELESS_FIRST_ROWS and not has_answers()):
            raise LostProcessError(
                f"{n_rows} rows of {unit.name} in succession, up to row {row:,} of the input, have"
                f" each ended the worker process that computed them alone (or took longer than"
                f" batch_timeout there), {N_TRIES} times. The"
                " cause may be the function, a library or the workers' memory rather than the rows;"
                " the workers' logs may say more. Fix it, and rerun the same call to resume."
            )


class _Calls:
    """Records the rows that the function is called on, before each call.

    In the unit's journal, and at the end in the log. Without a journal, in the log at once, for the
    whole unit: it is a single batch, or in an object store, which counts calls by the unit.
    """

    def __init__(self, output: Output, unit: Unit, journal: Journal | None) -> None:
        self._output = output
        self._unit = unit
        self._journal = journal
        self._called: list[Range] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._journal is not None:
            with contextlib.suppress(FencedError):  # a fenced run's calls are not counted
                note_called(self._output, self._called, self._journal.name, self._output.run)

    def begin(self, batch: Batch, pace: Pace) -> _BatchCalls:
        """Record that a batch is begun; return what is told of its calls."""
        if self._journal is not None:
            self._journal.begin(batch.start, batch.stop, waits=batch.is_ready)
        return _BatchCalls(self, batch, pace)

    def finish(self, record: Record) -> None:
        """Record that a batch is finished."""
        if self._journal is not None:
            self._journal.append(record)

    def on_wait(self, rows: Range) -> None:
        """Rows wait for a context."""
        if self._journal is not None:
            self._journal.wait(*rows)

    def on_call(self, rows: Range) -> None:
        """A function is called on rows."""
        if self._journal is not None:
            self._journal.call(*rows)
            self._called.append(rows)
        elif not self._called:
            self._called = [(s.offset, s.offset + s.n_rows) for s in self._unit.spans or ()]
            note_called(self._output, self._called, None, self._output.run)


class _BatchCalls:
    """Passes on what happens to the rows of one batch; a ``Watch``."""

    def __init__(self, calls: _Calls, batch: Batch, pace: Pace) -> None:
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
            _stop_in_time(self._pace)
        self._is_called = True
        first, end = self._rows
        # With a filter below, it is not known which rows of the input these are.
        is_known = n_rows == end - first
        self._calls.on_call((first + start, first + stop) if is_known else self._rows)


class _Flight:
    """The batches of a unit that are begun and not finished; for the task's thread."""

    def __init__(self, computation: Computation, spec: UnitSpec, calls: _Calls, pace: Pace) -> None:
        self._computation = computation
        self._spec = spec
        self._calls = calls
        self._pace = pace
        #: Begun batches: when, and what waits for them.
        self._begun: dict[int, tuple[Batch, float, Submission[Outcome]]] = {}
        #: Finished, but after one that is not; by first row.
        self._finished: list[tuple[int, Record]] = []

    def records(self, todo: Iterable[Batch]) -> Iterator[Record]:
        """Compute batches; yield their records in input order, each journalled when it is done.

        Raises
        ------
        Reschedule
            If the worker is about to end, and the next batch would not be done by then.
        """
        for batch in todo:
            is_suspect = self._pace.suspects.include(batch.start)
            if is_suspect:  # alone: only then do its rows, and no others, pay for a process death
                yield from self._drain()
            try:
                _stop_in_time(self._pace)
                self._begin(batch, is_suspect)
            except Reschedule:
                yield from self._drain()
                raise
            yield from self._drain() if is_suspect else self._collect(is_waiting=False)
        if self._begun and self._computation.is_attended:  # its lane is free for another unit
            hand_over(sum(batch.stop - batch.start for batch, *_ in self._begun.values()))
        yield from self._drain()

    def _drain(self) -> Iterator[Record]:
        while self._begun:
            yield from self._collect(is_waiting=True)
        yield from self._collect(is_waiting=False)

    def _begin(self, batch: Batch, is_alone: bool) -> None:
        if self._pace.suspects.gives_up(batch.start):
            outcome = _given_up(batch, self._computation, self._spec, self._pace.suspects)
            self._finish(batch, outcome)
            return
        begun = time.perf_counter()
        watch = self._calls.begin(batch, self._pace)
        submission = self._computation.submit(batch, watch, is_alone)
        self._begun[batch.start] = batch, begun, submission

    def _collect(self, is_waiting: bool) -> Iterator[Record]:
        """Finish the batches that are done; wait for the first one, if told to."""
        futures = [one.future for *_, one in self._begun.values() if one.future is not None]
        if is_waiting and len(futures) == len(self._begun):
            with in_time(self._computation.timeout_s):  # for one of those in flight to end
                concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
        for start, (batch, begun, submission) in list(self._begun.items()):
            if submission.future is None or submission.future.done():
                outcome = submission.result()
                del self._begun[start]
                self._finish(batch, outcome)
                if submission.future is None:  # what is served has several batches in flight
                    self._pace.observe(start, time.perf_counter() - begun)
        # Parts have their rows in input order; what is finished early waits, journalled already.
        first = min(self._begun, default=math.inf)
        while self._finished and self._finished[0][0] < first:
            yield heapq.heappop(self._finished)[1]

    def _finish(self, batch: Batch, outcome: Outcome) -> None:
        schema, facts = self._spec.schema, self._computation.stats.facts
        record = make_record(batch.start, batch.stop, outcome, schema, facts)
        self._calls.finish(record)
        heapq.heappush(self._finished, (batch.start, record))


def _stop_in_time(pace: Pace) -> None:
    """Raise Reschedule if the worker is about to end, and a batch would not be done by then."""
    if time.monotonic() + pace.batch_s > stops_at():
        raise Reschedule


def _given_up(
    batch: Batch, computation: Computation, spec: UnitSpec, suspects: Suspects
) -> Outcome:
    """A row that fails without being computed.

    It is not journalled as begun: should the rest of its work end a process as well, the row is
    not charged again; the gate counts the death, and ends the task after too many.
    """
    timeout_s = spec.timeout_s
    causes = "killed for its memory, or by a crash of native code"
    causes += "" if timeout_s is None else ", or because it took longer than batch_timeout"
    what = f"the worker process ended {N_TRIES} times while it was computed alone ({causes})"
    if suspects.is_late(batch.start) and timeout_s is not None:
        what = f"took longer than batch_timeout ({timeout_s:g} s), computed alone"
    error = LostProcessError(
        f"Row {batch.start:,} of the input: {what}. What the workers logged may say more."
    )
    return computation.failed(batch, error)


def make_record(
    start: int, stop: int, outcome: Outcome, schema: PartSchema, facts: Mapping[str, str]
) -> Record:
    """The record of input rows that this task has just computed."""
    cast = outcome.call.cast_column if outcome.call is not None else None
    tables = [table for frame in outcome.frames for table in schema.tables(frame, cast)]
    errors = [str(error) for error in outcome.errors[:MAX_ERRORS]]
    return Record(start, stop, pa.concat_tables(tables), len(outcome.errors), errors, dict(facts))


def grouped(
    records: Iterable[Record], each: Callable[[Record], None] = lambda _: None
) -> Iterator[pa.Table]:
    """Concatenate the tables of records to row groups of up to ``GROUP_BYTES``.

    Parameters
    ----------
    each
        Called with each record as it is taken.
    """
    taken: list[pa.Table] = []
    n_bytes = 0
    for record in records:
        each(record)
        table = record.table
        if taken and n_bytes + table.nbytes > GROUP_BYTES:
            yield pa.concat_tables(taken)
            taken, n_bytes = [], 0
        taken.append(table)
        n_bytes += table.nbytes
    yield pa.concat_tables(taken)
