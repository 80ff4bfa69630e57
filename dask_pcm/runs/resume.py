"""What earlier runs have done of a job, and what is left to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dask_pcm.frames.failed_rows import ERROR
from dask_pcm.ledger.inventory import Counts, is_first, take_inventory
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.suspects import Cost
from dask_pcm.ledger.unit_journals import journal_names
from dask_pcm.runs.cutter import Cutter
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.report import Report
from dask_pcm.runs.recover import recover
from dask_pcm.runs.units.schema import PartSchema


@dataclass(frozen=True, slots=True)
class Resumed:
    """An output that was taken over from earlier runs.

    Attributes
    ----------
    inventory
        Rows of each part.
    cutter
        What is left to do.
    costs
        Rows that have cost processes.
    n_to_retry
        Failed rows that are computed again.
    """

    inventory: Mapping[str, Counts]
    cutter: Cutter
    costs: tuple[Cost, ...]
    n_to_retry: int

    def count(self, report: Report) -> None:
        """Enter what earlier runs have done in the report of this one."""
        for name, counts in self.inventory.items():
            report.rows_resumed += counts.n_rows
            report.rows_failed += counts.n_failed
            report.units_resumed += not is_first(name)
        report.rows = report.rows_resumed


def resume(
    output: Output, plan: Plan, schema: PartSchema, max_bytes: int, retry_failed: bool
) -> Resumed:
    """Count the parts, commit the finished rows of journals, and cut the rest.

    Parameters
    ----------
    max_bytes
        Input that a unit of several pieces may have.
    retry_failed
        Whether rows with an error are computed again.

    Raises
    ------
    OutputError
        A part is damaged or not of this job; nothing was changed.
    """
    extent = plan.extent()
    inventory = take_inventory(output, extent)  # before `recover` changes anything
    has_journals = bool(journal_names(output))
    costs = recover(output, extent, schema)
    if has_journals:  # their rows may be parts now
        inventory = take_inventory(output, extent)
    cutter = cut_missing(plan, inventory, max_bytes)
    n_to_retry = _retry(output, plan, inventory, cutter) if retry_failed else 0
    return Resumed(inventory, cutter, costs, n_to_retry)


def cut_missing(plan: Plan, parts: Iterable[str], max_bytes: int) -> Cutter:
    """What is left to do where these parts are committed."""
    places = [parse_name(name) for name in parts]
    ranges = [place for place in places if isinstance(place, tuple)]
    partitions = frozenset(place for place in places if isinstance(place, int))
    return Cutter(plan, ranges, partitions, max_bytes)


def _retry(output: Output, plan: Plan, inventory: Mapping[str, Counts], cutter: Cutter) -> int:
    """Have `cutter` cut the failed rows again; return how many."""
    n_to_retry = 0
    for name, counts in inventory.items():
        place = parse_name(name)
        if place is None or not counts.n_failed:
            continue
        failed: list[int] = []
        if ERROR in plan.meta.columns:
            errors = output.read_table(name, [ERROR])[ERROR]
            failed = np.flatnonzero(errors.is_valid().to_numpy()).tolist()
        cutter.retry(place, failed)
        n_to_retry += counts.n_failed
    return n_to_retry
