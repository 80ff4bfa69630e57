"""An attempt at a unit by rows: batch by batch, each noted as it is finished.

What is noted outlives its process (``journal.py``). The next attempt at the unit takes it over; a
later run commits it as it is (``recover.py``).
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pandas as pd
import pyarrow as pa

from dask_pcm.errors import FencedError, LostProcessError, OutputError
from dask_pcm.frames.call import ERROR, failing_all_rows, noting
from dask_pcm.ledger.journal.reader import apart
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.journal.writer import Journal
from dask_pcm.ledger.log import note_called
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.suspects import N_TRIES, Cost, Suspects
from dask_pcm.ledger.unit_journals import begin_journal, journal_names, read_journals
from dask_pcm.plugins.worker.deadline import ruled
from dask_pcm.plugins.worker.task import n_losses, task_stats, was_lost
from dask_pcm.runs.cutter import cut_to
from dask_pcm.runs.plan import Unit
from dask_pcm.runs.units.compute import Batch, batches
from dask_pcm.runs.units.schema import GROUP_BYTES, PartSchema

logger = logging.getLogger(__name__)

#: Errors that are told of each batch.
MAX_ERRORS = 3
#: Batches that take less are noted several at a time.
_RECORD_S = 0.02
#: So many rows given up in succession are no bad luck; fewer where nothing was ever answered.
_HOPELESS_ROWS, _HOPELESS_FIRST_ROWS = 25, 5


@dataclass(frozen=True, slots=True)
class _Earlier:
    """What earlier attempts at a unit have left.

    Attributes
    ----------
    names
        Their journals.
    records
        What they had finished.
    costs
        Rows that have cost processes, as far as that is settled.
    in_flight
        Rows that the last one had begun and not finished; nobody knows yet whether they ended it.
    was_waiting
        Whether the last one waited for a context when it ended.
    late
        Rows in flight of which it is known that their call took too long.
    """

    names: list[str]
    records: list[Record]
    costs: list[Cost]
    in_flight: list[Range]
    was_waiting: bool = False
    late: list[Range] = field(default_factory=list)

    @classmethod
    def of(cls, unit: Unit, output: Output, batch_rows: int) -> _Earlier:
        """Look for journals, and note what those who left them had not come to."""
        found_by_name = dict(read_journals(output, unit.name)) if _may_have_journals(output) else {}
        if not found_by_name:
            return cls([], [], [], _unit_in_flight(unit, output, batch_rows))
        useful = {name: found for name, found in found_by_name.items() if found is not None}
        settled = {name for found in useful.values() for name in found.settled}
        last = [found for name, found in useful.items() if name not in settled]
        for name, found in useful.items():
            note_called(output, found.called, name, found.about["run"])
        late = [found for found in last if found.last_words]
        for found in late:
            logger.warning(
                "A call on rows %s of the input took longer than batch_timeout; its process was"
                " ended. Where its threads were:\n%s",
                ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in found.in_flight),
                found.last_words,
            )
        return cls(
            list(found_by_name),
            apart([record for found in useful.values() for record in found.records]),
            [cost for found in useful.values() for cost in found.costs],
            [rows for found in last for rows in found.in_flight],
            any(found.waiting for found in last),
            [rows for found in late for rows in found.in_flight],
        )


def _may_have_journals(output: Output) -> bool:
    return output.storage.has_journals or was_lost()


def _unit_in_flight(unit: Unit, output: Output, batch_rows: int) -> list[Range]:
    """What a unit had in flight when it was lost, where no journal tells.

    All of it, if it leaves none unless it was lost before. Else it had not been begun.
    """
    place = parse_name(unit.name)
    is_noted = output.storage.has_journals and (unit.n_rows or 0) > batch_rows
    return [place] if was_lost() and not is_noted and isinstance(place, tuple) else []


def attempt(
    unit: Unit,
    graph: bytes,
    output: Output,
    layout: PartSchema,
    batch_rows: int,
    max_bytes: int,
    origin: Mapping[str, Any],
    costs: Iterable[Cost] = (),
    timeout_s: float | None = None,
) -> Generator[Record, None, None]:
    """Rows of a unit in their order: what earlier attempts had finished, and the rest.

    What is computed is noted before it is yielded, and stays so until ``clear``. Rows that ended
    their process are tried apart from others, and fail in the end (see ``suspects.py``).

    Parameters
    ----------
    batch_rows
        Rows of one call.
    max_bytes
        Of input that is read at a time.
    origin
        What a part made of it would tell.
    costs
        Processes that rows have cost in earlier runs.
    timeout_s
        What a call may take; None for no limit.

    Raises
    ------
    LostProcessError
        Where processes end with row after row.
    """
    # So that a call that hangs is known to be the one, each is noted before it begins.
    shortest = batch_rows if timeout_s is None else 0
    earlier = _Earlier.of(unit, output, shortest)
    kept, suspects = earlier.records, _suspects(unit, earlier, costs)
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
            journal.settle(earlier.names, list(suspects))
            for record in kept:
                journal.append(record)
        for name in earlier.names:  # now that all of it is in ours
            output.storage.remove(name)
        _check_hope(unit, suspects, functools.partial(_has_answers, output, kept))
        pace = Pace(batch_rows, suspects)
        left = replace(unit, spans=tuple(spans))
        todo = batches(left, graph, max_bytes, pace.end) if spans else ()
        fresh = _computed(todo, layout, journal, calls, pace, timeout_s)
        yield from heapq.merge(kept, fresh, key=lambda record: record.start)


def _suspects(unit: Unit, earlier: _Earlier, costs: Iterable[Cost]) -> Suspects:
    """What rows of a unit have cost, in earlier runs, in this one, and at the last death.

    Whether a process ended by a fault of its own is asked only where rows were begun, and once
    for each end: the journal that tells of it is settled before anything else is done, so that
    rows pay for no end that they had no part in. A process that ends elsewhere, while rows are
    read or a part is committed, is not asked about: the gate counts on, and ends the task.
    """
    place = parse_name(unit.name)
    first, end = place if isinstance(place, tuple) else (0, 0)
    mine = (cost for cost in costs if cost.start < end and first < cost.stop)
    suspects = Suspects([*mine, *earlier.costs])
    # What waited is innocent, but has the gate count anew all the same.
    is_blamed = bool((earlier.in_flight or earlier.was_waiting) and n_losses())
    for rows in earlier.in_flight:
        if is_blamed or rows in earlier.late:
            suspects.blame(rows, rows in earlier.late)
    return suspects


def _has_answers(output: Output, kept: Iterable[Record]) -> bool:
    """Whether any row of the job has been answered, as far as can be seen."""
    if any(record.stop - record.start > record.n_failed for record in kept):
        return True
    for name in output.parts():
        with contextlib.suppress(FileNotFoundError, OutputError):
            note = output.read_note(name)
            if note.get("rows", 0) > note.get("failed", 0):
                return True
    return False


def _check_hope(unit: Unit, suspects: Suspects, has_answers: Callable[[], bool]) -> None:
    """Where row after row ends its process, it is not the rows that are at fault."""
    n_rows = 0
    for row in suspects.given_up():
        n_rows = n_rows + 1 if suspects.gives_up(row - 1) else 1
        if n_rows == _HOPELESS_ROWS or (n_rows == _HOPELESS_FIRST_ROWS and not has_answers()):
            raise LostProcessError(
                f"{n_rows} rows of {unit.name} in succession, up to row {row:,} of the input, have"
                f" each ended the worker process that computed them alone (or took longer than"
                f" batch_timeout there), {N_TRIES} times. It may"
                " be the function, a library or the memory of the workers, whatever the rows; what"
                " the workers logged may say more. Mend the cause, and run the same again to go on."
            )


class _Calls:
    """Which rows the function is called on, said before each call.

    In the unit's journal, and at the end in the log. Where there is no journal, in the log at
    once, for the whole unit: it is a batch, or it is in an object store, where the rows that were
    called are known by the unit only.
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
            with contextlib.suppress(FencedError):  # nothing of this run is counted any more
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
    layout: PartSchema,
    journal: Journal | None,
    calls: _Calls,
    pace: Pace,
    timeout_s: float | None,
) -> Iterator[Record]:
    descriptor = None if journal is None else journal.descriptor
    for batch in todo:
        if pace.suspects.gives_up(batch.start):  # and if so, it is alone
            record = _given_up(batch, layout, pace.suspects, timeout_s)
        else:
            begun = time.perf_counter()
            with calls.of(batch), ruled(timeout_s, descriptor):
                frame = batch.compute()
            record = make_record(batch.start, batch.stop, frame, layout)
            pace.observe(batch.start, time.perf_counter() - begun)
        if journal is not None:
            journal.append(record)
        yield record


def _given_up(
    batch: Batch, layout: PartSchema, suspects: Suspects, timeout_s: float | None
) -> Record:
    """A row that fails without being computed.

    It is not noted as begun: should what else is done with it end a process as well, nobody asks
    whether it did, and the gate ends the task.
    """
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
    return make_record(batch.start, batch.stop, frame, layout)


class Pace:
    """How many rows are computed between two records: so many that noting them costs little.

    Suspects come by themselves, however little time they take.
    """

    def __init__(self, batch_rows: int, suspects: Suspects) -> None:
        self.suspects = suspects
        self._batch_rows = self._n_rows = batch_rows

    def end(self, start: int) -> int:
        """Where the rows end, at the latest, that begin with `start`."""
        return self.suspects.end(start, self._n_rows, self._batch_rows)

    def observe(self, start: int, seconds: float) -> None:
        if seconds < _RECORD_S and not self.suspects.include(start):
            self._n_rows *= 2


def make_record(start: int, stop: int, frame: pd.DataFrame, layout: PartSchema) -> Record:
    """What became of rows of the input that were computed just now."""
    # Where the reasons do not come through, the functions have told of them.
    failed = frame[ERROR].dropna().tolist() if ERROR in frame.columns else task_stats.errors
    failed = failed if task_stats.is_by_rows else []
    errors = [str(error) for error in failed[:MAX_ERRORS]]
    table = pa.concat_tables(layout.tables(frame))
    return Record(start, stop, table, len(failed), errors, dict(task_stats.facts))


def clear(unit: str, output: Output) -> None:
    """A unit is committed: what was noted of it is not needed any more."""
    if _may_have_journals(output):
        for name in journal_names(output, unit):
            output.storage.remove(name)


def grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables put together to row groups."""
    taken: list[pa.Table] = []
    n_bytes = 0
    for table in tables:
        if taken and n_bytes + table.nbytes > GROUP_BYTES:
            yield pa.concat_tables(taken)
            taken, n_bytes = [], 0
        taken.append(table)
        n_bytes += table.nbytes
    yield pa.concat_tables(taken)
