"""The loop that drives a run, on the client: submits units and collects their results."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures import Future as Answer
from dataclasses import dataclass, field

from distributed import Future

from dask_pcm.errors import InputError, OutputError, RunCancelledError
from dask_pcm.ledger.inventory import take_inventory
from dask_pcm.ledger.layout import CANCEL, PAUSE
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.stash import drop_stash
from dask_pcm.ledger.storage.object_store import is_of_client
from dask_pcm.ledger.takeover import read_requests
from dask_pcm.runs.gate_link import GateLink
from dask_pcm.runs.lost import lost, unreachable
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.heartbeat import Heartbeat
from dask_pcm.runs.progress.interrupt import deferred
from dask_pcm.runs.progress.meter import Meter, meter
from dask_pcm.runs.progress.results import Results
from dask_pcm.runs.progress.state import RunState
from dask_pcm.runs.resume import cut_missing
from dask_pcm.runs.units.graph import Unit
from dask_pcm.runs.units.unit import UnitResult
from dask_pcm.runs.window import Window

logger = logging.getLogger(__name__)

_WAIT_S = 0.25
#: A run ends when parts have vanished this often.
_MAX_GONE = 3

#: Units that have ended, and their results on the way to the client.
_Arriving = tuple[Sequence[tuple[Unit, Future]], Answer[list[UnitResult]]]


@dataclass(slots=True, eq=False, kw_only=True)
class Driver:
    """Submits units through a window, and collects their results, until the output is complete.

    Used by one thread; `state` may be read from any.

    Attributes
    ----------
    max_bytes
        Input that a unit of several pieces may have.
    """

    plan: Plan
    output: Output
    window: Window
    link: GateLink
    state: RunState
    results: Results
    heartbeat: Heartbeat
    max_bytes: int
    _arriving: list[_Arriving] = field(default_factory=list)
    _n_gone: int = 0
    _next_look: float = 0.0

    def drive(self, is_shown: bool) -> None:
        """Compute every unit that is not committed yet.

        Raises
        ------
        Exception
            What a unit raised, with a note that names it; RunCancelledError or FailedRowsError if
            the run was ended; KeyboardInterrupt if the user interrupts it.
        """
        self._report(float(self.window.cutter.n_rows), 1)
        self.heartbeat.beat()
        with self.state.clock, meter(is_shown) as shown, deferred() as interrupt_if_asked:
            try:
                self.link.begin_waiting()
                self._follow(read_requests(self.output))
                while not (self.window.is_empty and self._is_complete()):
                    interrupt_if_asked()
                    self._check_results()
                    if not self.state.is_paused:
                        self.window.feed(self.state.gate.demand)
                    self._collect()
                    self._look(shown)
                self._check_results()
            except BaseException as error:
                self._cancel(error)
                raise
            self._look(shown, is_last=True)

    def _collect(self) -> None:
        """Take in the results that are here; wait a moment if none is.

        A result may be lost with its worker on the way here. Dask then runs the unit again, which
        finds its part in the ledger; other results are not held up.
        """
        if ended := self.window.ended(0.0 if self._arriving else _WAIT_S):
            self._raise_failed(ended)
            self._arriving.append((ended, self.link.gather([future for _, future in ended])))
        wait([results for _, results in self._arriving], _WAIT_S, FIRST_COMPLETED)
        # Listed once: a result that arrives between two looks would be lost.
        arrived = [one for one in self._arriving if one[1].done()]
        self._arriving = [one for one in self._arriving if one not in arrived]
        for units, results in arrived:
            if results.exception() is not None:  # one was lost on the way, for good
                self._raise_failed(units)
            for (unit, future), result in zip(units, results.result(), strict=True):
                self._take_in(unit, future, result)

    def _take_in(self, unit: Unit, future: Future, result: UnitResult) -> None:
        self.window.collected(future)
        self.results.add(unit, result)
        if not result.is_resumed:
            n_rows = max(0, (unit.n_rows or 1) - result.n_kept)
            self.window.learn(result.infer_s or result.total_s, n_rows)
        if not self.state.has_committed:
            # In this order: a failure in between must not put the old parts beside the new one.
            self.state.has_committed = True
            drop_stash(self.output)

    def _check_results(self) -> None:
        self.results.check(self.window.cutter.n_cut if self.window.is_empty else None)

    def _raise_failed(self, units: Sequence[tuple[Unit, Future]]) -> None:
        """Raise what the first of the units that failed raised."""
        for unit, future in units:
            if future.status == "cancelled":
                raise lost(self.output.path, unit.name)
            if future.status == "error":
                raise self._failure(unit, future.exception())

    def _failure(self, unit: Unit, error: BaseException) -> BaseException:
        if is_of_client(error):
            failure = unreachable(self.output.path, unit.name, error)
            failure.__cause__ = error
            return failure
        end = (
            "."
            if isinstance(error, InputError)
            else "; fix the cause and rerun the same call to resume."
        )
        error.add_note(
            f"This ended the run of {unit.name} in {self.output.path!r}. What was committed stays"
            f"{end}"
        )
        return error

    def _look(self, shown: Meter, is_last: bool = False) -> None:
        """Read the user's requests, report to the gate, and show the progress; not too often."""
        state, window = self.state, self.window
        state.clock.run(not state.is_paused or len(window) > 0)
        now = time.monotonic()
        if now < self._next_look and not is_last:
            return
        self._next_look = now + self.output.storage.poll_s
        self.heartbeat.check()
        if not is_last:  # what is done cannot be cancelled
            self._follow(read_requests(self.output))
        # While the run is paused, the gate need not keep workers for it.
        n_rows = 0 if state.is_paused else window.cutter.n_rows
        n_units = 0 if state.is_paused else max(1, len(window))
        self._report(float(n_rows), n_units)
        self._warn_of_lack()
        shown.show(state.progress, state.lack)

    def _report(self, n_rows: float, n_units: int) -> None:
        if gate := self.link.report(n_rows, n_units):
            self.state.note_gate(gate)

    def _warn_of_lack(self) -> None:
        lack = "" if self.state.is_paused else self.link.lack
        if lack and not self.state.lack:
            logger.warning("The run of %s waits: %s.", self.output.path, lack)
        self.state.lack = lack

    def _follow(self, requests: frozenset[str]) -> None:
        if CANCEL in requests:
            raise RunCancelledError(
                f"The run of {self.output.path!r} was cancelled. What was committed stays; rerun"
                " the same call to resume."
            )
        if self.state.is_paused != (PAUSE in requests):
            self.state.is_paused = not self.state.is_paused
            if self.state.is_paused:
                self.window.withdraw(self.link.processing())
            self.heartbeat.beat()

    def _cancel(self, error: BaseException) -> None:
        """Cancel what has not run. What still runs is fenced when the output is closed."""
        for _, results in self._arriving:
            results.cancel()
        with contextlib.suppress(Exception):  # `error` is the one to raise
            self.window.cancel()
        if isinstance(error, KeyboardInterrupt):
            logger.warning(
                "Interrupted: %s of %s %s are in %s. Rerun the same call to resume.",
                f"{self.state.n_done:,}",
                f"{self.state.n_total:,}",
                self.state.counted,
                self.output.path,
            )

    def _is_complete(self) -> bool:
        """Whether the parts make up the job: each row of the input once.

        What is missing is computed again: a part was removed meanwhile, or a late commit of a
        fenced run had taken the place of one.

        Raises
        ------
        OutputError
            Parts are damaged, or vanish again and again.
        """
        inventory = take_inventory(self.output, self.plan.extent())
        missing = cut_missing(self.plan, inventory, self.max_bytes)
        state = self.state
        state.report.rows = sum(counts.n_rows for counts in inventory.values())
        state.report.rows_failed = sum(counts.n_failed for counts in inventory.values())
        state.n_done = state.n_total - missing.n_rows
        if missing.is_empty:
            self._refuse_foreign_files()
            return True
        if self._n_gone == _MAX_GONE:
            raise OutputError(
                f"Parts of {self.output.path!r} vanish again and again after their commit. Find"
                " what removes them (another program, a clean-up of the filesystem), then rerun the"
                " same call to resume."
            )
        self._n_gone += 1
        self.window.cutter = missing
        return False

    def _refuse_foreign_files(self) -> None:
        """Readers of the output would read other Parquet files there as well."""
        if others := [name for name in self.output.foreign_files() if name.endswith(".parquet")]:
            raise OutputError(
                f"During the run, another program has put files into the output"
                f" {self.output.path!r}, such as {others[0]!r}. Move them away, and rerun the same"
                " call: nothing is computed twice."
            )
