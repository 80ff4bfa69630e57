"""What earlier attempts at a unit have left: finished rows, and rows that their deaths may cost."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dask_pcm.ledger.journal.reader import apart
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.log import note_called
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Range
from dask_pcm.ledger.suspects import Cost, Suspects
from dask_pcm.ledger.unit_journals import journal_names, read_journals
from dask_pcm.plugins.worker.task import n_losses, was_lost
from dask_pcm.runs.units.graph import Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """What the journals of earlier attempts at a unit hold.

    Attributes
    ----------
    journals
        Their names.
    records
        Rows that they had finished.
    costs
        Rows that have cost processes, as far as that is settled.
    in_flight
        Rows that the last attempt had begun and not finished; perhaps they ended its process.
    was_waiting
        Whether the last attempt waited for a context when it ended.
    drafts
        What rows that were not finished had so far, by key; see ``Drafting``.
    late
        Those of `in_flight` whose call took longer than ``batch_timeout``.
    """

    journals: list[str]
    records: list[Record]
    costs: list[Cost]
    in_flight: list[Range]
    was_waiting: bool = False
    late: list[Range] = field(default_factory=list)
    drafts: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, unit: Unit, output: Output, batch_rows: int, has_drafts: bool) -> History:
        """Read the journals of a unit, and log the calls that their attempts had not logged."""
        may_have = may_have_journals(output, has_drafts)
        found_by_name = dict(read_journals(output, unit.name)) if may_have else {}
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
            _longest(found.drafts for found in useful.values()),
        )


def _longest(attempts: Iterable[Mapping[int, list[int]]]) -> dict[int, list[int]]:
    """The longest draft of each row."""
    chosen: dict[int, list[int]] = {}
    for drafts in attempts:
        for key, draft in drafts.items():
            chosen[key] = max(draft, chosen.get(key, []), key=len)
    return chosen


def may_have_journals(output: Output, has_drafts: bool) -> bool:
    """Whether to look for journals.

    A listing of an object store costs: there, after a loss, and where rows leave drafts, as they do
    when their worker leaves in time.
    """
    return output.storage.has_journals or has_drafts or was_lost()


def _unit_in_flight(unit: Unit, output: Output, batch_rows: int) -> list[Range]:
    """The rows that a unit without a journal had in flight when it was lost.

    All of them if a first attempt writes no journal; otherwise it had not begun any.
    """
    place = parse_name(unit.name)
    is_noted = output.storage.has_journals and (unit.n_rows or 0) > batch_rows
    return [place] if was_lost() and not is_noted and isinstance(place, tuple) else []


def suspects_of(unit: Unit, history: History, costs: Iterable[Cost]) -> Suspects:
    """The processes that rows of a unit have cost: in earlier runs, in this one, and the last one.

    Each process death is charged at most once: the next attempt marks its journal settled before
    doing any work. Deaths count only while rows were in flight; the gate counts the others (while
    reading or committing), and ends the task after too many.
    """
    place = parse_name(unit.name)
    first, end = place if isinstance(place, tuple) else (0, 0)
    mine = (cost for cost in costs if cost.start < end and first < cost.stop)
    suspects = Suspects([*mine, *history.costs])
    # An attempt that only waited is not to blame, but resets the gate's count like the others.
    is_blamed = bool((history.in_flight or history.was_waiting) and n_losses())
    for rows in history.in_flight:
        if is_blamed or rows in history.late:
            suspects.blame(rows, rows in history.late)
    return suspects


def clear_journals(unit: str, output: Output, has_drafts: bool) -> None:
    """Delete the journals of a committed unit."""
    if may_have_journals(output, has_drafts):
        for name in journal_names(output, unit):
            output.storage.remove(name)
