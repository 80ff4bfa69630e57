"""What attempts of earlier runs have left: finished rows are committed, and costs carried on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dask_pcm.ledger.attempt import grouped
from dask_pcm.ledger.journal import Found, Record, apart
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name, range_name
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.ledger.suspects import Cost, Suspects

logger = logging.getLogger(__name__)

#: Stands for a unit in the name of the journal that carries costs from run to run.
_COSTS = "costs"


def recover(output: Output) -> tuple[Cost, ...]:
    """Commit what attempts of earlier runs had finished, as parts of their own.

    Returns which of the other rows have cost processes. Rows that were in hand at the end of a run
    have cost none: nobody can tell any more what ended it.
    """
    committed = _committed(output)
    names = output.journal_names()
    journals: dict[str, list[Found]] = {}
    costs: list[Cost] = []
    for name, found in output.journals():
        if found is not None:
            output.note_called(found.called, name, found.about["run"])
            journals.setdefault(found.about["unit"], []).append(found)
            costs += found.costs
    for found_of_unit in journals.values():
        records = apart([record for found in found_of_unit for record in found.records])
        records = [r for r in records if any(committed.missing(r.start, r.stop))]
        for neighbours in _runs(records):
            _commit(neighbours, found_of_unit[0].about, output)
    if costs:
        committed = _committed(output)
        costs = [cost for cost in Suspects(costs) if any(committed.missing(*cost[:2]))]
    if costs:  # for the run after this one, should this one end early
        with contextlib.closing(output.begin_journal(_COSTS, {})) as journal:
            journal.settle([], costs)
    for name in names:
        output.remove(name)
    return tuple(costs)


def forget(output: Output) -> None:
    """All is committed: what rows have cost in earlier runs is not needed any more."""
    for name in output.journal_names(_COSTS):
        output.remove(name)


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
    note = {**about, **facts, "unit": name, "rows": n_rows, "failed": n_failed}
    output.commit(name, grouped(record.table for record in records), lambda: note)
    logger.info("%s: %s rows that were finished but not committed", name, f"{n_rows:,}")
