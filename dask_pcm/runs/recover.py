"""What attempts of earlier runs have left: finished rows are committed, and costs carried on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dask_pcm.ledger.inventory import Extent
from dask_pcm.ledger.journal.reader import Found, apart
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.log import note_called
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name, range_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.suspects import Cost, Suspects
from dask_pcm.ledger.unit_journals import begin_journal, journal_names, read_journals
from dask_pcm.runs.units.attempt import grouped
from dask_pcm.runs.units.schema import PartSchema

logger = logging.getLogger(__name__)

#: Stands for a unit in the name of the journal that carries costs from run to run.
_COSTS = "costs"


def recover(
    output: Output, extent: Extent | None = None, layout: PartSchema | None = None
) -> tuple[Cost, ...]:
    """Commit what attempts of earlier runs had finished, as parts of their own.

    Never what overlaps with what is committed: a run that was shut out may leave a journal of rows
    that have been computed since. Nor what is none of the job's (`extent`, `layout`).

    Returns which of the other rows have cost processes. Rows that were in hand at the end of a run
    have cost none: nobody can tell any more what ended it.
    """
    names = journal_names(output)
    journals: dict[str, list[Found]] = {}
    costs: list[Cost] = []
    for name, found in read_journals(output):
        if found is not None:
            note_called(output, found.called, name, found.about["run"])
            journals.setdefault(found.about["unit"], []).append(found)
            costs += found.costs
    _commit_records(output, journals, extent, layout)
    if costs:
        committed = _committed(output)
        costs = [cost for cost in Suspects(costs) if any(committed.missing(*cost[:2]))]
    if costs:  # for the run after this one, should this one end early
        with contextlib.closing(begin_journal(output, _COSTS, {})) as journal:
            journal.settle([], costs)
    for name in names:
        output.storage.remove(name)
    return tuple(costs)


def _commit_records(
    output: Output,
    journals: Mapping[str, list[Found]],
    extent: Extent | None,
    layout: PartSchema | None,
) -> None:
    committed, new = _committed(output), list[Range]()
    for found_of_unit in journals.values():
        records = [
            record
            for found in found_of_unit
            for record in found.records
            if _is_free(record, committed, Ranges(new)) and _is_of_job(record, extent, layout)
        ]
        for neighbours in _runs(apart(records)):
            _commit(neighbours, found_of_unit[0].about, output)
            new.append((neighbours[0].start, neighbours[-1].stop))


def _is_free(record: Record, *committed: Ranges) -> bool:
    rows = record.start, record.stop
    return all(list(ranges.missing(*rows)) == [rows] for ranges in committed)


def _is_of_job(record: Record, extent: Extent | None, layout: PartSchema | None) -> bool:
    rows, schema = (record.start, record.stop), record.table.schema
    is_fitting = layout is None or list(schema)[: len(layout.schema)] == list(layout.schema)
    if is_fitting and (extent is None or not extent.fault(rows, len(record.table))):
        return True
    logger.warning("Rows %s to %s of a journal are none of this job's, and are left out", *rows)
    return False


def forget(output: Output) -> None:
    """All is committed: what rows have cost in earlier runs is not needed any more."""
    for name in journal_names(output, _COSTS):
        output.storage.remove(name)


def _committed(output: Output) -> Ranges:
    places = (parse_name(name) for name in output.parts())
    return Ranges(place for place in places if isinstance(place, tuple))


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
    note = {**about, **facts, "rows": n_rows, "failed": n_failed}
    output.commit(name, grouped(record.table for record in records), lambda: note)
    logger.info("%s: %s rows that were finished but not committed", name, f"{n_rows:,}")
