"""The driver of a run, on the client: feeds units through a window and gathers their results."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures import Future as Answer
from dataclasses import replace
from typing import Any

import numpy as np
from distributed import Client, Future

from dask_pcm.config import Config
from dask_pcm.errors import (
    CancelledError,
    FailedRowsError,
    FencedError,
    InputError,
    OutputError,
)
from dask_pcm.frames.call import ERROR
from dask_pcm.ledger import status
from dask_pcm.ledger.inventory import Counts, is_first, take_inventory
from dask_pcm.ledger.layout import CANCEL, PAUSE
from dask_pcm.ledger.log import read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name, range_name
from dask_pcm.ledger.stash import drop_stash
from dask_pcm.ledger.storage.object_store import is_of_client
from dask_pcm.ledger.takeover import read_requests
from dask_pcm.ledger.unit_journals import journal_names
from dask_pcm.plugins.worker.tally import unpack
from dask_pcm.runs.cutter import Cutter
from dask_pcm.runs.gate_link import Link
from dask_pcm.runs.lost import lost, unreachable
from dask_pcm.runs.plan import Plan, Unit
from dask_pcm.runs.progress.failure_limit import FailureLimit
from dask_pcm.runs.progress.heartbeat import Heartbeat
from dask_pcm.runs.progress.interrupt import deferred
from dask_pcm.runs.progress.meter import Meter, Stopwatch, meter
from dask_pcm.runs.progress.report import Report, rows_recomputed
from dask_pcm.runs.recover import forget, recover
from dask_pcm.runs.units.unit import UnitResult, UnitSpec
from dask_pcm.runs.window import Window
from dask_pcm.scheduling.rules.first_batches import FirstBatches
from dask_pcm.scheduling.units import DeviceDemand

logger = logging.getLogger(__name__)

_WAIT_S = 0.25
_MAX_ERRORS, _MAX_KINDS = 5, 1_000  # told; told apart
#: Times that parts may be gone at the end of a run.
_MAX_GONE = 3


class Driver:
    """Feeds units through a window and gathers their results.

    One thread drives; `report` and `progress` may be read from any.
    """

    def __init__(
        self,
        client: Client,
        plan: Plan,
        job: UnitSpec,
        config: Config,
        limit: FailureLimit,
        retries: bool,
    ) -> None:
        self._client = client
        self._plan = plan
        self._job = job
        self._output = job.output
        self._max_bytes = config.unit_bytes
        self._limit = limit
        self._retries = retries
        self.report = Report(run=job.output.run)
        self.has_committed = False
        self._is_paused = False
        self._clock = Stopwatch()
        self._window = Window(client, plan, job, config)
        self._link = Link(client, job.output.run, plan.refs, self._window.kind)
        #: Units that have ended, and their results on their way here.
        self._arriving: list[tuple[Sequence[tuple[Unit, Future]], Answer[list[UnitResult]]]] = []
        self._lack = ""
        self._stock: dict[str, Counts] = {}
        self._seconds = self._rows = 0.0  # of inference and reading, over units that ended
        self._ran_on: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._n_done = self._n_before = 0
        self._n_to_retry = self._n_gone = 0
        self._first = FirstBatches()  # of the input, as far as this run computes it
        self._first_error: tuple[int, bytes] | None = None  # of which unit; packed
        self._status: dict[str, Any] = {}
        self._loads_before: tuple[int, float] | None = None
        self._next_look = 0.0
        self._heart = Heartbeat(job.output, lambda: self.progress)

    def begin(self, output: Output, provenance: Mapping[str, Any]) -> None:
        """The output is taken over: units commit to it from now on, and tell of their origin."""
        self._output = output
        self._job = self._window.job = replace(self._job, output=output, provenance=provenance)

    @property
    def progress(self) -> status.Progress:
        """How the run stands."""
        is_counted = self._plan.spans is not None
        state = self.report.state
        if state == status.RUNNING and self._is_paused:
            state = status.PAUSED
        return status.Progress(
            state,
            self._n_done,
            self._plan.n_rows,
            "rows" if is_counted else "parts",
            self.report.rows_failed,
            (self._n_done - self._n_before) / max(1e-3, self._clock.seconds),
            self._status.get("n_warm", 0),
            self._status.get("n_workers", 0),
            self.report.context_loads,
            self._lack,
        )

    def warm(self) -> None:
        """Have workers load now, while the output is still looked through."""
        if self._plan.n_rows:
            self._tell(float(self._plan.n_partitions), self._plan.n_partitions)

    def close(self) -> None:
        """Nothing more will come."""
        self._link.close()

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Say from time to time how the run stands, for other processes."""
        with self._heart:
            yield

    def drive(self, is_shown: bool) -> None:
        """Run every unit that is not there yet.

        Raises
        ------
        Exception
            What a unit raised, with a note where; CancelledError or FailedRowsError where the run
            was ended; KeyboardInterrupt when the user stops it.
        """
        self._take_stock()
        self._tell(float(self._window.cutter.n_rows), 1)  # loads from now on are this run's
        self._heart.beat()
        if not self._window.cutter.is_empty:
            self._plan.start_below(self._client)
        with (
            self._clock,
            meter(is_shown) as shown,
            deferred() as interrupt_if_asked,
        ):
            try:
                self._link.begin_waiting()
                self._heed(read_requests(self._output))
                while not (self._window.is_empty and self._is_whole()):
                    interrupt_if_asked()
                    self._check_limit()
                    if not self._is_paused:
                        self._feed()
                    self._gather()
                    self._look(shown)
                self._check_limit()
            except BaseException as error:
                self._cancel(error)
                raise
            finally:
                self._plan.close()
            self._look(shown, is_last=True)
        self._sum_up()

    def _take_stock(self) -> None:
        """Count what earlier runs have done, and cut the rest."""
        output, extent = self._output, self._plan.extent()
        self._stock = take_inventory(
            output, extent
        )  # first: where parts are wrong, nothing is done
        has_journals = bool(journal_names(output))
        costs = recover(output, extent, self._job.layout)
        self._job = self._window.job = replace(self._job, costs=costs)
        if has_journals:  # and what they told of may be parts now
            self._stock = take_inventory(output, extent)
        cutter = self._window.cutter = self._cutter_after(self._stock)
        report = self.report
        for name, counts in self._stock.items():
            report.rows_resumed += counts.n_rows
            report.rows_failed += counts.n_failed
            report.units_resumed += not is_first(name)
        report.rows = report.rows_resumed
        report.committed_by = self._output.commit_method
        if not self._stock:
            # Without rows: from now on the folder can be read, with the right columns.
            empty = self._job.layout.table(self._plan.meta)
            own = {"run": self._output.run, "rows": 0, "failed": 0}
            self._output.commit(range_name(0, 0), [empty], lambda: {**self._job.provenance, **own})
        if self._retries:
            self._retry()
        self._n_done = self._n_before = self._plan.n_rows - cutter.n_rows
        report.state = status.RUNNING

    def _cutter_after(self, stock: Mapping[str, Counts]) -> Cutter:
        """What a stock of parts lacks."""
        places = [parse_name(name) for name in stock]
        ranges = [place for place in places if isinstance(place, tuple)]
        partitions = frozenset(place for place in places if isinstance(place, int))
        return Cutter(self._plan, ranges, partitions, self._max_bytes)

    def _retry(self) -> None:
        for name, counts in self._stock.items():
            place = parse_name(name)
            if place is None or not counts.n_failed:
                continue
            failed: list[int] = []
            if ERROR in self._plan.meta.columns:
                errors = self._output.read_table(name, [ERROR])[ERROR]
                failed = np.flatnonzero(errors.is_valid().to_numpy()).tolist()
            self._window.cutter.again(place, failed)
            self._n_to_retry += counts.n_failed

    def _feed(self) -> None:
        row_s = self._seconds / self._rows if self._rows else None
        askers = [DeviceDemand(*one) for one in self._status.get("askers", ())] or [
            DeviceDemand("", 1, None)
        ]
        self._window.feed([one._replace(row_s=one.row_s or row_s) for one in askers])

    def _gather(self) -> None:
        """Take in every unit that has ended and whose result is here; wait a moment if none is.

        A result may be lost with its worker on its way. It is computed again, which asks the ledger
        first, as soon as there is a worker; nothing else is held up until then.
        """
        if ended := self._window.ended(0.0 if self._arriving else _WAIT_S):
            for unit, future in ended:
                if future.status in ("error", "cancelled"):
                    self._raise(unit, future)
            self._arriving.append((ended, self._link.gather([future for _, future in ended])))
        wait([results for _, results in self._arriving], _WAIT_S, FIRST_COMPLETED)
        arrived = [one for one in self._arriving if one[1].done()]
        self._arriving = [one for one in self._arriving if one not in arrived]
        for units, results in arrived:
            self._take_in(units, results)

    def _take_in(
        self, units: Sequence[tuple[Unit, Future]], results: Answer[list[UnitResult]]
    ) -> None:
        if results.exception() is not None:
            for unit, future in units:  # one was lost on its way, and could not be had again
                if future.status in ("error", "cancelled"):
                    self._raise(unit, future)
        for (unit, future), result in zip(units, results.result(), strict=True):
            self._window.take_out(future)
            self._n_done += unit.n_rows or 1
            self._count(unit, result)
            if not self.has_committed:
                self.has_committed = True
                drop_stash(self._output)

    def _count(self, unit: Unit, result: UnitResult) -> None:
        report = self.report
        report.rows_failed += result.n_failed
        if unit.again is not None:  # those that had failed before
            report.rows_failed -= self._stock[unit.name].n_failed
            self._n_to_retry -= self._stock[unit.name].n_failed
            report.rows_retried += unit.n_rows or result.n_rows
        report.infer_s += result.infer_s
        report.units += 1
        if unit.again is None:
            report.rows += result.n_rows
            self._note_failing(unit, result)
        elif not unit.again:
            report.rows += result.n_rows - self._stock[unit.name].n_rows
        if len(self._errors) < _MAX_KINDS:
            self._errors.update(result.errors)
        report.errors = [text for text, _ in self._errors.most_common(_MAX_ERRORS)]
        if not result.is_resumed:
            self._seconds += result.infer_s or result.total_s
            self._rows += max(0, (unit.n_rows or 1) - result.n_kept)
        if result.facts:
            self._ran_on["/".join(result.facts.values())] += result.n_rows
            report.ran_on = dict(self._ran_on)

    def _check_limit(self) -> None:
        """End a run that cannot come to what was wanted of it."""
        self._check_first()
        report, is_all = self.report, self._window.is_empty
        if self._limit.allows(report.rows_failed - self._n_to_retry, report.rows, is_all):
            return
        sample = "".join(f"\n  {text}" for text in report.errors) or "\n  (in an earlier run)"
        n_left = self._plan.n_rows - self._n_done
        raise FailedRowsError(
            f"{report.rows_failed:,} rows failed, more than max_failed_rows={self._limit} allows of"
            f" {report.rows:,}; {n_left:,} {self.progress.counted} are still to be done in"
            f" {self._output.path!r}. Some of the errors:{sample}\nMend the cause and run again"
            " with retry_failed=True (--retry-failed), or allow more."
        )

    def _note_failing(self, unit: Unit, result: UnitResult) -> None:
        if result.failing is None:
            return
        self._first.note(unit.number, result.failing)
        if result.error:
            found = (unit.number, result.error)
            self._first_error = min(self._first_error or found, found)

    def _check_first(self) -> None:
        """Raise what the function raises where nothing else has ever come of this job."""
        n_parts = self._window.cutter.n_cut if self._window.is_empty else None
        if self._first_error is None or not self._first.is_hopeless(n_parts):
            return
        has_succeeded = any(counts.n_rows > counts.n_failed for counts in self._stock.values())
        if has_succeeded or self._limit.allows_all(max(self._plan.n_rows, self.report.rows)):
            return
        error = unpack(self._first_error[1])
        error.add_note(
            f"This ended the run of {self._output.path!r}, since nothing else came of its first"
            " rows. Mend the cause and run again with retry_failed=True (--retry-failed), or with"
            " overwrite=True where the function changes. If these rows are bad in themselves,"
            " max_failed_rows='100%' goes on."
        )
        raise error

    def _raise(self, unit: Unit, future: Future) -> None:
        if future.status == "cancelled":
            raise lost(self._output.path, unit.name)
        error: BaseException = future.exception()
        if is_of_client(error):
            raise unreachable(self._output.path, unit.name, error) from error
        text = (
            f"This ended the run of {unit.name} in {self._output.path!r}. What was committed stays"
        )
        go_on = "; mend the cause and run the same again to go on."
        error.add_note(text + ("." if isinstance(error, InputError) else go_on))
        raise error

    def _look(self, shown: Meter, is_last: bool = False) -> None:
        """See what is wanted of the run, and say how it stands."""
        self._clock.run(not self._is_paused or len(self._window) > 0)
        now = time.monotonic()
        if now >= self._next_look or is_last:
            self._next_look = now + self._output.storage.poll_s
            self._heart.check()
            if not is_last:  # what is done cannot be cancelled
                self._heed(read_requests(self._output))
            # While it is paused, the gate need not keep workers for it.
            n_rows = 0 if self._is_paused else self._window.cutter.n_rows
            n_units = 0 if self._is_paused else max(1, len(self._window))
            self._tell(float(n_rows), n_units)
            self._complain()
            shown.show(self.progress, self._lack)

    def _complain(self) -> None:
        """Say once what the run cannot go on without."""
        lack = "" if self._is_paused else self._link.lack
        if lack and not self._lack:
            logger.warning("The run of %s waits: %s.", self._output.path, lack)
        self._lack = lack

    def _heed(self, requests: frozenset[str]) -> None:
        if CANCEL in requests:
            raise CancelledError(
                f"The run of {self._output.path!r} was cancelled. What was committed stays; run the"
                " same again to go on."
            )
        if self._is_paused != (PAUSE in requests):
            self._is_paused = not self._is_paused
            if self._is_paused:
                self._window.hold_back(self._link.processing())
            self._heart.beat()

    def _tell(self, n_rows: float, n_units: int) -> None:
        """Report to the gate what is still to come, and learn how the contexts stand."""
        answer = self._link.report(n_rows, n_units)
        if answer is None:
            return
        self._status = answer
        n_loads, load_s = self._status["n_loads"], self._status["load_s"]
        if self._loads_before is None:
            self._loads_before = (n_loads, load_s)
        self.report.context_loads = n_loads - self._loads_before[0]
        self.report.load_s = load_s - self._loads_before[1]
        self.report.workers = max(self.report.workers, self._status["n_workers"])

    def _cancel(self, error: BaseException) -> None:
        """Take back what has not run; what runs on is shut out when the output is closed."""
        for _, results in self._arriving:
            results.cancel()
        with contextlib.suppress(Exception):
            self._window.cancel()
        if isinstance(error, KeyboardInterrupt):
            logger.warning(
                "Interrupted: %s of %s rows are in %s. Run the same again to go on.",
                f"{self._n_done:,}",
                f"{self._plan.n_rows:,}",
                self._output.path,
            )

    def _is_whole(self) -> bool:
        """Whether the parts that are there make up the job: each row of the input once.

        What is missing is computed again: somebody removed it meanwhile, or what a run that was
        shut out has put since had taken its place.

        Raises
        ------
        OutputError
            Where parts are wrong, or go away again and again.
        """
        stock = take_inventory(self._output, self._plan.extent())
        cutter = self._cutter_after(stock)
        self.report.rows = sum(counts.n_rows for counts in stock.values())
        self.report.rows_failed = sum(counts.n_failed for counts in stock.values())
        self._n_done = self._plan.n_rows - cutter.n_rows
        if cutter.is_empty:
            self._refuse_strangers()
            return True
        if self._n_gone == _MAX_GONE:
            raise OutputError(
                f"Parts of {self._output.path!r} are gone again whenever they have been committed."
                " See what removes them (another program, a clean-up of the filesystem), and run"
                " the same again to go on."
            )
        self._n_gone += 1
        self._window.cutter = cutter
        return False

    def _refuse_strangers(self) -> None:
        """Whatever reads the output would read these as well."""
        if others := [name for name in self._output.foreign_files() if name.endswith(".parquet")]:
            raise OutputError(
                f"While the run was at work, files that are not ours have come into the output"
                f" {self._output.path!r}, such as {others[0]!r}. Move them away, and run the same"
                " again: nothing is computed twice."
            )

    def _sum_up(self) -> None:
        output = self._output
        if self._job.costs:
            forget(output)
        self.report.rows_recomputed = rows_recomputed(read_lines(output), output.run, self._rows_of)

    def _rows_of(self, name: str) -> int:
        with contextlib.suppress(FileNotFoundError, FencedError):
            return int(self._output.read_note(name)["rows"])
        return 0
