"""An attempt at a unit by rows: batch by batch, each journalled when it is finished.

Journalled rows survive the process. The next attempt at the unit takes them over; a later run
commits them as they are (``recover.py``).
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import logging
import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dask_pcm.errors import LostProcessError, OutputError
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.ledger.suspects import N_TRIES, Suspects
from dask_pcm.ledger.unit_journals import begin_journal
from dask_pcm.plugins.worker.deadline import ruled
from dask_pcm.plugins.worker.task import was_lost
from dask_pcm.runs.units.calls import Calls
from dask_pcm.runs.units.compute import Computation
from dask_pcm.runs.units.flight import Flight
from dask_pcm.runs.units.graph import Unit, cut_to
from dask_pcm.runs.units.history import History, suspects_of
from dask_pcm.runs.units.pace import Pace
from dask_pcm.runs.units.schema import GROUP_BYTES
from dask_pcm.runs.units.unit import UnitSpec

logger = logging.getLogger(__name__)

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
    # With a timeout, each call is journalled before it begins: it may be the one that hangs. What
    # has drafts has a journal for them.
    is_coarse = spec.timeout_s is None and not computation.has_drafts
    shortest = spec.batch_rows if is_coarse else 0
    history = History.of(unit, output, shortest, computation.has_drafts)
    kept, suspects = history.records, suspects_of(unit, history, spec.costs)
    done = Ranges((record.start, record.stop) for record in kept)
    spans = [left for span in unit.spans or () for left in cut_to(span, done)]
    with ExitStack() as stack:
        journal = None
        begin = functools.partial(begin_journal, output, unit.name, origin)
        is_long = sum(span.n_rows for span in spans) > shortest
        has_left = bool(kept or suspects or history.drafts)
        if has_left or (output.storage.has_journals and is_long):
            journal = begin()
            stack.callback(journal.close)
        calls = stack.enter_context(Calls(output, unit, journal, history.drafts, begin))
        computation.resume(history.drafts)
        if journal is not None:
            journal.settle(history.journals, list(suspects))
            for record in kept:
                journal.append(record)
            if history.drafts:
                journal.keep(history.drafts)
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
        flight = Flight(computation, spec, calls, pace)
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
