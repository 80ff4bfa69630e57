"""An attempt at a unit by rows: batch by batch, each noted as it is finished.

What is noted outlives its process (``journal.py``). The next attempt at the unit takes it over; a
later run commits it as it is (``recover``).
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pandas as pd
import pyarrow as pa

from dask_pcm.ledger.compute import Batch, batches
from dask_pcm.ledger.cut import cut_to
from dask_pcm.ledger.journal import Found, Journal, Record, apart
from dask_pcm.ledger.layout import GROUP_BYTES, Layout
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name, range_name
from dask_pcm.ledger.plan import Unit
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.mapping import ERROR
from dask_pcm.plugins.hold import spent

logger = logging.getLogger(__name__)

#: Errors that are told of each batch.
MAX_ERRORS = 3
#: Batches that take less are noted several at a time.
_RECORD_S = 0.02


def attempt(
    unit: Unit,
    graph: bytes,
    output: Output,
    layout: Layout,
    batch_rows: int,
    max_bytes: int,
    origin: Mapping[str, Any],
) -> Generator[Record, None, None]:
    """Rows of a unit in their order: what earlier attempts had finished, and the rest.

    What is computed is noted before it is yielded, and stays so until ``clear``.

    Parameters
    ----------
    batch_rows
        Rows of one call.
    max_bytes
        Of input that is read at a time.
    origin
        What a part made of it would tell.
    """
    kept, earlier = _take_over(unit, output)
    done = Ranges((record.start, record.stop) for record in kept)
    spans = [left for span in unit.spans or () for left in cut_to(span, done)]
    rest = [(span.offset, span.offset + span.n_rows) for span in spans]
    output.note_start(unit.name, unit.n_rows, rest if kept else None)
    with ExitStack() as stack:
        journal = None
        if kept or sum(span.n_rows for span in spans) > batch_rows:
            journal = output.begin_journal(unit.name, origin)
        if journal is not None:
            stack.callback(journal.close)
            for record in kept:
                journal.append(record)
        for name in earlier:  # now that all of it is in ours
            output.remove(name)
        pace = Pace(batch_rows)
        left = replace(unit, spans=tuple(spans))
        todo = batches(left, graph, max_bytes, lambda: pace.n_rows) if spans else ()
        fresh = _computed(todo, layout, journal, pace)
        yield from heapq.merge(kept, fresh, key=lambda record: record.start)


def _computed(
    todo: Iterable[Batch], layout: Layout, journal: Journal | None, pace: Pace
) -> Iterator[Record]:
    for batch in todo:
        if journal is not None:
            journal.begin(batch.start, batch.stop)
        begun = time.perf_counter()
        record = make_record(batch.start, batch.stop, batch.compute(), layout)
        pace.observe(time.perf_counter() - begun)
        if journal is not None:
            journal.append(record)
        yield record


class Pace:
    """How many rows are computed between two records: so many that noting them costs little."""

    def __init__(self, batch_rows: int) -> None:
        self.n_rows = batch_rows

    def observe(self, seconds: float) -> None:
        if seconds < _RECORD_S:
            self.n_rows *= 2


def make_record(start: int, stop: int, frame: pd.DataFrame, layout: Layout) -> Record:
    """What became of rows of the input that were computed just now."""
    # Where the reasons do not come through, the functions have told of them.
    failed = frame[ERROR].dropna().tolist() if ERROR in frame.columns else spent.errors
    failed = failed if spent.is_by_rows else []
    errors = [str(error) for error in failed[:MAX_ERRORS]]
    table = pa.concat_tables(layout.tables(frame))
    return Record(start, stop, table, len(failed), errors, dict(spent.facts))


def _take_over(unit: Unit, output: Output) -> tuple[list[Record], list[str]]:
    """What earlier attempts at a unit had finished, and the names of their journals."""
    records: list[Record] = []
    names = []
    for name, found in output.journals(unit.name):
        names.append(name)
        if found is not None:
            records += found.records
            _note_unbegun(output, found, unit.name)
    return apart(records), names


def _note_unbegun(output: Output, found: Found, unit: str) -> None:
    """What an attempt had not come to was not computed by it, although it had started the unit."""
    place = parse_name(unit)
    if isinstance(place, tuple):
        finished = ((record.start, record.stop) for record in found.records)
        rest = list(Ranges([*finished, *found.begun]).missing(*place))
        if rest:
            output.note_unbegun(found.about["run"], rest)


def clear(unit: str, output: Output) -> None:
    """A unit is committed: what was noted of it is not needed any more."""
    for name in output.journal_names(unit):
        output.remove(name)


def recover(output: Output) -> None:
    """Commit what attempts of earlier runs had finished, as parts of their own."""
    places = (parse_name(name) for name in output.parts())
    committed = Ranges(place for place in places if isinstance(place, tuple))
    journals: dict[str, list[Found]] = {}
    for _, found in output.journals():
        if found is not None:
            _note_unbegun(output, found, found.about["unit"])
            journals.setdefault(found.about["unit"], []).append(found)
    for found_of_unit in journals.values():
        records = apart([record for found in found_of_unit for record in found.records])
        records = [r for r in records if any(committed.missing(r.start, r.stop))]
        for neighbours in _runs(records):
            _commit(neighbours, found_of_unit[0].about, output)
    for name in output.journal_names():
        output.remove(name)


def _runs(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records that follow each other, together."""
    taken: list[Record] = []
    for record in records:
        if taken and taken[-1].stop != record.start:
            yield taken
            taken = []
        taken.append(record)
    if taken:
        yield taken


def _commit(records: list[Record], about: Mapping[str, Any], output: Output) -> None:
    name = range_name(records[0].start, records[-1].stop)
    n_rows = sum(len(record.table) for record in records)
    n_failed = sum(record.n_failed for record in records)
    facts = {key: value for record in records for key, value in record.facts.items()}
    note = {**about, **facts, "unit": name, "rows": n_rows, "failed": n_failed}
    output.commit(name, grouped(record.table for record in records), lambda: note)
    logger.info("%s: %s rows that were finished but not committed", name, f"{n_rows:,}")


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
