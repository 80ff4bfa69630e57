"""Recovery from the journals of earlier runs: commits finished rows, carries costs over."""

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

#: Name, in place of a unit's, of the journal that carries costs from run to run.
_COSTS = "costs"


def recover(
    output: Output, extent: Extent | None = None, schema: PartSchema | None = None
) -> tuple[Cost, ...]:
    """Commit rows that attempts of earlier runs had finished, as parts of their own.

    Records that overlap a part are dropped: a fenced run may leave a journal of rows that were
    computed again since. So are records that do not belong to the job (`extent`, `schema`).

    Returns
    -------
    tuple of Cost
        Processes that the other rows have cost. Rows in flight when a run ended are not charged:
        what ended their process cannot be found out any more.
    """
    names = journal_names(output)
    journals: dict[str, list[Found]] = {}
    costs: list[Cost] = []
    for name, found in read_journals(output):
        if found is not None:
            note_called(output, found.called, name, found.about["run"])
            journals.setdefault(found.about["unit"], []).append(found)
            costs += found.costs
    _commit_records(output, journals, extent, schema)
    if costs:
        committed = _committed(output)
        costs = [cost for cost in Suspects(costs) if any(committed.missing(*cost[:2]))]
    if costs:  # written before the old journals go, so a crash in between loses none
        with contextlib.closing(begin_journal(output, _COSTS, {})) as journal:
            journal.settle([], costs)
    for name in names:
        output.storage.remove(name)
    return tuple(costs)


def _commit_records(
    output: Output,
    journals: Mapping[str, list[Found]],
    extent: Extent | None,
    schema: PartSchema | None,
) -> None:
    committed, new = _committed(output), list[Range]()
    for found_of_unit in journals.values():
        records = [
            record
            for found in found_of_unit
            for record in found.records
            if _is_free(record, committed, Ranges(new)) and _is_of_job(record, extent, schema)
        ]
        for neighbours in _runs(apart(records)):
            _commit(neighbours, found_of_unit[0].about, output)
            new.append((neighbours[0].start, neighbours[-1].stop))


def _is_free(record: Record, *committed: Ranges) -> bool:
    rows = record.start, record.stop
    return all(list(ranges.missing(*rows)) == [rows] for ranges in committed)


def _is_of_job(record: Record, extent: Extent | None, schema: PartSchema | None) -> bool:
    rows, fields = (record.start, record.stop), list(record.table.schema)
    is_fitting = schema is None or fields[: len(schema.schema)] == list(schema.schema)
    if is_fitting and (extent is None or not extent.fault(rows, len(record.table))):
        return True
    logger.warning("Rows %s to %s of a journal do not belong to this job: left out", *rows)
    return False


def forget(output: Output) -> None:
    """Delete the journal of costs, once every row is committed."""
    for name in journal_names(output, _COSTS):
        output.storage.remove(name)


def _committed(output: Output) -> Ranges:
    places = (parse_name(name) for name in output.parts())
    return Ranges(place for place in places if isinstance(place, tuple))


def _runs(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Groups of adjacent records."""
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
    output.commit(name, grouped(records), lambda: note)
    logger.info("%s: %s rows that were finished but not committed", name, f"{n_rows:,}")
