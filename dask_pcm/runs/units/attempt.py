"""An attempt at a unit by rows: batch by batch, each journalled when it is finished.

Journalled rows survive the process. The next attempt at the unit takes them over; a later run
commits them as they are (``recover.py``).
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Self

import pandas as pd
import pyarrow as pa

from dask_pcm.errors import FencedError, LostProcessError, OutputError
from dask_pcm.frames.call import failing_all_rows, noting
from dask_pcm.frames.failed_rows import ERROR
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.journal.writer import Journal
from dask_pcm.ledger.log import note_called
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.suspects import N_TRIES, Suspects
from dask_pcm.ledger.unit_journals import begin_journal
from dask_pcm.plugins.worker.deadline import ruled
from dask_pcm.plugins.worker.task import task_stats
from dask_pcm.runs.cutter import cut_to
from dask_pcm.runs.plan import Unit
from dask_pcm.runs.units.compute import Batch, batches
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
    unit: Unit, graph: bytes, spec: UnitSpec, origin: Mapping[str, Any]
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
        pace = Pace(spec.batch_rows, suspects)
        left = replace(unit, spans=tuple(spans))
        todo = batches(left, graph, spec.max_bytes, pace.end) if spans else ()
        fresh = _computed(todo, spec, journal, calls, pace)
        yield from heapq.merge(kept, fresh, key=lambda record: record.start)


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
        self._batch = (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._journal is not None:
            with contextlib.suppress(FencedError):  # a fenced run's calls are not counted
                note_called(self._output, self._called, self._journal.name, self._output.run)

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """While a batch is computed."""
        self._batch = (batch.start, batch.stop)
        if self._journal is not None:
            self._journal.begin(*self._batch)
        with noting(self._on_wait, self._on_call):
            yield

    def _on_wait(self) -> None:
        if self._journal is not None:
            self._journal.wait(*self._batch)

    def _on_call(self, start: int, stop: int, n_rows: int) -> None:
        first, end = self._batch
        # With a filter below, it is not known which rows of the input these are.
        rows = (first + start, first + stop) if n_rows == end - first else self._batch
        if self._journal is not None:
            self._journal.call(*rows)
            self._called.append(rows)
        elif not self._called:
            self._called = [(s.offset, s.offset + s.n_rows) for s in self._unit.spans or ()]
            note_called(self._output, self._called, None, self._output.run)


def _computed(
    todo: Iterable[Batch],
    spec: UnitSpec,
    journal: Journal | None,
    calls: _Calls,
    pace: Pace,
) -> Iterator[Record]:
    descriptor = None if journal is None else journal.descriptor
    for batch in todo:
        if pace.suspects.gives_up(batch.start):  # and if so, it is alone
            record = _given_up(batch, spec, pace.suspects)
        else:
            begun = time.perf_counter()
            with calls.of(batch), ruled(spec.timeout_s, descriptor):
                frame = batch.compute()
            record = make_record(batch.start, batch.stop, frame, spec.schema)
            pace.observe(batch.start, time.perf_counter() - begun)
        if journal is not None:
            journal.append(record)
        yield record


def _given_up(batch: Batch, spec: UnitSpec, suspects: Suspects) -> Record:
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
    with failing_all_rows(error):
        frame = batch.compute()
    return make_record(batch.start, batch.stop, frame, spec.schema)


def make_record(start: int, stop: int, frame: pd.DataFrame, schema: PartSchema) -> Record:
    """The record of input rows that this task has just computed to `frame`."""
    # Where the output has no error column, the functions have noted the errors in `task_stats`.
    failed = frame[ERROR].dropna().tolist() if ERROR in frame.columns else task_stats.errors
    failed = failed if task_stats.is_by_rows else []
    errors = [str(error) for error in failed[:MAX_ERRORS]]
    table = pa.concat_tables(schema.tables(frame))
    return Record(start, stop, table, len(failed), errors, dict(task_stats.facts))


def grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate tables to row groups of up to ``GROUP_BYTES``."""
    taken: list[pa.Table] = []
    n_bytes = 0
    for table in tables:
        if taken and n_bytes + table.nbytes > GROUP_BYTES:
            yield pa.concat_tables(taken)
            taken, n_bytes = [], 0
        taken.append(table)
        n_bytes += table.nbytes
    yield pa.concat_tables(taken)
