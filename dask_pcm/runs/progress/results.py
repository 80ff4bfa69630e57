"""The results of units, summed up in the run's report; they may show that it cannot succeed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from dask_pcm.errors import FailedRowsError
from dask_pcm.ledger.inventory import Counts
from dask_pcm.plugins.worker.stats import unpack
from dask_pcm.runs.progress.failure_limit import FailureLimit
from dask_pcm.runs.progress.state import RunState
from dask_pcm.runs.units.graph import Unit
from dask_pcm.runs.units.unit import UnitResult
from dask_pcm.scheduling.rules.first_batches import FirstBatches

#: Errors shown in the report, and errors told apart: texts that name a row are all different.
_MAX_ERRORS, _MAX_KINDS = 5, 1_000


class Results:
    """Sums up results in `state`, and checks them against what the user allows.

    Parameters
    ----------
    path
        The output, for messages.
    inventory
        Parts that earlier runs have committed.
    n_to_retry
        Failed rows among them that this run computes again.
    """

    def __init__(
        self,
        state: RunState,
        limit: FailureLimit,
        path: str,
        inventory: Mapping[str, Counts],
        n_to_retry: int,
    ) -> None:
        self._state = state
        self._limit = limit
        self._path = path
        self._inventory = inventory
        self._n_to_retry = n_to_retry
        self._errors: Counter[str] = Counter()
        self._ran_on: Counter[str] = Counter()
        self._first = FirstBatches()  # of the input, as far as this run computes it
        self._first_error: tuple[int, bytes] | None = None  # number of the unit; packed exception

    def add(self, unit: Unit, result: UnitResult) -> None:
        """Count the result of a unit."""
        # A partition whose rows are not known counts as one.
        self._state.n_done += unit.n_rows or 1
        self._count_rows(unit, result)
        report = self._state.report
        report.infer_s += result.infer_s
        report.units += 1
        if len(self._errors) < _MAX_KINDS:  # bounds the memory of a run of a billion rows
            self._errors.update(result.errors)
        report.errors = [text for text, _ in self._errors.most_common(_MAX_ERRORS)]
        if result.facts:
            self._ran_on["/".join(result.facts.values())] += result.n_rows
            report.ran_on = dict(self._ran_on)

    def _count_rows(self, unit: Unit, result: UnitResult) -> None:
        report = self._state.report
        report.rows_failed += result.n_failed
        if unit.retry is None:
            report.rows += result.n_rows
            self._note_failing(unit, result)
            return
        before = self._inventory[unit.name]
        report.rows_failed -= before.n_failed
        self._n_to_retry -= before.n_failed
        report.rows_retried += unit.n_rows or result.n_rows
        if not unit.retry:  # the whole part was computed again, perhaps to another number of rows
            report.rows += result.n_rows - before.n_rows

    def _note_failing(self, unit: Unit, result: UnitResult) -> None:
        if result.failing is None:
            return
        self._first.note(unit.number, result.failing)
        if result.error:
            found = (unit.number, result.error)
            self._first_error = min(self._first_error or found, found)

    def check(self, n_units: int | None) -> None:
        """End a run that cannot succeed.

        Parameters
        ----------
        n_units
            Units of the run, once all their results are here; None before.

        Raises
        ------
        FailedRowsError
            More rows failed than the user allows.
        Exception
            What the function raised on every row of the first batches.
        """
        self._check_first(n_units)
        report, is_all = self._state.report, n_units is not None
        if self._limit.allows(report.rows_failed - self._n_to_retry, report.rows, is_all):
            return
        sample = "".join(f"\n  {text}" for text in report.errors) or "\n  (in an earlier run)"
        n_left, counted = self._state.n_total - self._state.n_done, self._state.counted
        raise FailedRowsError(
            f"{report.rows_failed:,} rows failed, more than {self._limit} allows of"
            f" {report.rows:,}; {n_left:,} {counted} are still to be done in"
            f" {self._path!r}. Some of the errors:{sample}\nFix the cause and run again"
            " with retry_failed=True (--retry-failed), or allow more."
        )

    def _check_first(self, n_units: int | None) -> None:
        """Raise what the function raised, if no row of the output has ever succeeded."""
        if self._first_error is None or not self._first.is_hopeless(n_units):
            return
        has_succeeded = any(counts.n_rows > counts.n_failed for counts in self._inventory.values())
        n_rows = max(self._state.n_total, self._state.report.rows)
        if has_succeeded or self._limit.allows_all(n_rows):
            return
        error = unpack(self._first_error[1])
        error.add_note(
            f"This ended the run of {self._path!r}, since nothing else came of its first"
            " rows. Fix the cause and run again with retry_failed=True (--retry-failed), or with"
            " overwrite=True where the function changes. If these rows are bad in themselves,"
            " allow them with max_failed_share=1 (--max-failed-share 1)."
        )
        raise error
