"""The driver of a run, on the client: feeds units through a window and gathers their results."""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
from dask.utils import key_split
from distributed import Client, Future

from dask_pcm.config import Config
from dask_pcm.errors import OutputError, PCMError
from dask_pcm.ledger import manifest
from dask_pcm.ledger.commit import Output, parse_name, range_name
from dask_pcm.ledger.plan import Cutter, Plan, Unit
from dask_pcm.ledger.progress import Meter, meter
from dask_pcm.ledger.report import Report, rows_recomputed
from dask_pcm.ledger.unit import Layout, UnitResult, run_unit
from dask_pcm.scheduling.units import unit_rows

logger = logging.getLogger(__name__)

_STATUS_EVERY_S = 0.25
_MAX_WAITING = 1_000  # units at the gate for each worker, however short they are
_MAX_ERRORS = 5


class Driver:
    """Feeds units through a window and gathers their results."""

    def __init__(self, client: Client, plan: Plan, output: Output, config: Config) -> None:
        self._client = client
        self._plan = plan
        self._output = output
        self._config = config
        self._layout = Layout.of(plan.meta, plan.reader)
        self._report = Report()
        self.has_committed = False
        self._units: dict[str, tuple[Unit, Future]] = {}  # outstanding, by key
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._seconds = self._rows = 0.0  # of inference and reading, over units that ended
        self._facts: dict[str, str] = {}
        self._n_keys = 0
        self._n_outstanding_rows = 0
        self._cutter: Cutter | None = None
        self._status: dict[str, Any] = {}
        self._loads_before: tuple[int, float] | None = None
        self._next_status = 0.0
        self._kind = key_split(self._key(0))

    def warm(self) -> None:
        """Have workers load now, while the output is still looked through."""
        if self._plan.n_rows:
            self._tell(float(self._plan.n_partitions), self._plan.n_partitions)

    def close(self) -> None:
        """Nothing more will come: the gate need not keep workers for it."""
        self._tell(0.0, 0)

    def drive(self, is_shown: bool) -> Report:
        """Run every unit that is not there yet.

        Raises
        ------
        Exception
            What a unit raised, with a note where; KeyboardInterrupt when the user stops it.
        """
        self._take_stock()
        assert self._cutter is not None
        if not self._cutter.is_empty:
            self._plan.start_below(self._client)
        n_total, before = self._plan.n_rows, self._plan.n_rows - self._cutter.n_rows
        self._n_done = before
        counted = "parts" if self._plan.spans is None else "rows"
        with meter(n_total, before, counted, is_shown) as shown:
            try:
                while not (self._cutter.is_empty and not self._units):
                    self._feed()
                    self._gather()
                    self._look(shown)
            except BaseException as error:
                self._cancel(error)
                raise
            self._look(shown, is_last=True)
        self._sum_up()
        return self._report

    def _take_stock(self) -> None:
        """Count what earlier runs committed, and cut the rest."""
        names = self._output.parts()
        with ThreadPoolExecutor(16) as pool:
            notes = list(pool.map(self._note, names))
        ranges: list[tuple[int, int]] = []
        partitions: set[int] = set()
        for name, note in zip(names, notes, strict=True):
            place = parse_name(name)
            if isinstance(place, int):
                partitions.add(place)
            elif place is not None and place[0] < place[1]:
                ranges.append(place)
            if note["rows"] or note["unit"] != range_name(0, 0):
                self._report.units_resumed += 1
                self._report.rows_resumed += note["rows"]
                self._report.rows_failed += note["failed"]
        self._report.rows = self._report.rows_resumed
        self._cutter = Cutter(self._plan, ranges, partitions)
        if not names:
            # Without rows: from now on the folder can be read, with the right columns.
            empty = self._layout.table(self._plan.meta)
            note = {"run": self._output.run, "unit": range_name(0, 0), "rows": 0, "failed": 0}
            self._output.commit(range_name(0, 0), empty, note)

    def _note(self, name: str) -> dict[str, Any]:
        try:
            note = self._output.read_note(name)
        except (OSError, ValueError) as error:
            raise OutputError(
                f"The part {name!r} in {self._output.path!r} cannot be read ({error}). Remove it,"
                " and its rows are computed again."
            ) from error
        if "rows" not in note:
            raise OutputError(
                f"{name!r} in {self._output.path!r} was not written by dask_pcm. Move it away."
            )
        return note

    def _feed(self) -> None:
        """Keep every worker's lanes filled and a little more at hand."""
        assert self._cutter is not None
        n_workers = max(1, self._status.get("n_workers", 1))
        n_wanted = n_workers * (self._config.n_lanes + 1)
        row_s = self._seconds / self._rows if self._rows else None
        enough_s = n_workers * self._config.ready_s
        while not self._cutter.is_empty and len(self._units) < n_workers * _MAX_WAITING:
            ready_s = (row_s or enough_s) * self._n_outstanding_rows
            if len(self._units) >= n_wanted and ready_s >= enough_s:
                break
            n_rows = unit_rows(
                self._cutter.n_rows,
                n_workers,
                self._plan.batch_rows,
                row_s,
                self._config.unit_s,
                self._config.max_unit_rows,
            )
            self._submit(self._cutter.cut(n_rows))

    def _submit(self, unit: Unit) -> None:
        self._n_keys += 1
        graph, keys, inputs = self._plan.graph(unit)
        with dask.annotate(pcm_rows=unit.n_rows or 1):
            future = self._client.submit(
                run_unit,
                unit,
                self._output,
                self._layout,
                graph,
                self._plan.refs,
                keys,
                inputs,
                key=self._key(self._n_keys),
                pure=False,
            )
        self._units[future.key] = (unit, future)
        self._n_outstanding_rows += unit.n_rows or 1
        future.add_done_callback(self._finished.put)

    def _key(self, number: int) -> str:
        return f"{self._plan.label}_unit-{self._output.run}-{number}"

    def _gather(self) -> None:
        """Take in every unit that has ended; wait a moment if none has."""
        ended = [future for future in self._ended() if future.key in self._units]
        for future in ended:
            if future.status != "finished":
                self._raise(future)
        results: list[UnitResult] = self._client.gather(ended)
        for future, result in zip(ended, results, strict=True):
            unit, _ = self._units.pop(future.key)
            self._n_outstanding_rows -= unit.n_rows or 1
            self._n_done += unit.n_rows or 1
            self._count(unit, result)
            if not self.has_committed:
                self.has_committed = True
                self._output.drop_aside()
            future.release()

    def _ended(self) -> Iterator[Future]:
        try:
            yield self._finished.get(timeout=_STATUS_EVERY_S)
            while True:
                yield self._finished.get_nowait()
        except queue.Empty:
            return

    def _count(self, unit: Unit, result: UnitResult) -> None:
        report = self._report
        report.rows += result.n_rows
        report.rows_failed += result.n_failed
        report.infer_s += result.infer_s
        report.units += 1
        report.errors = (report.errors + list(result.errors))[:_MAX_ERRORS]
        if result.facts and not self._facts:
            self._facts = dict(result.facts)
        if not result.is_resumed:
            self._seconds += result.infer_s or result.total_s
            self._rows += unit.n_rows or 1

    def _raise(self, future: Future) -> None:
        unit, _ = self._units[future.key]
        if future.status == "cancelled" or future.status == "lost":
            raise PCMError(
                f"The cluster dropped {unit.name} of {self._output.path!r} ({future.status}): it"
                " was restarted, or is gone. What was committed stays; run the same again to go on."
            )
        error: BaseException = future.exception()
        error.add_note(
            f"This ended the run of {unit.name} in {self._output.path!r}. What was committed stays;"
            " mend the cause and run the same again to go on."
        )
        raise error

    def _look(self, shown: Meter, is_last: bool = False) -> None:
        now = time.monotonic()
        assert self._cutter is not None
        if now >= self._next_status:
            n_rows, n_outstanding = self._cutter.n_rows, max(1, len(self._units))
            self._tell(float(n_rows), n_outstanding)
            self._next_status = now + _STATUS_EVERY_S
        if now >= self._next_status - _STATUS_EVERY_S or is_last:
            status = self._status
            n_warm, n_workers = status.get("n_warm", 0), status.get("n_workers", 0)
            note = f"{n_warm}/{n_workers} warm, {self._report.context_loads} loads"
            shown.show(self._n_done, note)

    def _tell(self, n_rows: float, n_units: int) -> None:
        """Report to the gate what is still to come, and learn how the contexts stand."""
        # A scheduler that is gone shows in the futures; one without the gate has nothing to tell.
        with contextlib.suppress(OSError, AttributeError):
            self._status = self._client.sync(
                self._client.scheduler.pcm_run,
                run=self._output.run,
                client=self._client.id,
                refs=pickle.dumps(self._plan.refs),
                kind=self._kind,
                n_rows=n_rows,
                n_units=n_units,
            )
            n_loads, load_s = self._status["n_loads"], self._status["load_s"]
            if self._loads_before is None:
                self._loads_before = (n_loads, load_s)
            self._report.context_loads = n_loads - self._loads_before[0]
            self._report.load_s = load_s - self._loads_before[1]
            self._report.workers = max(self._report.workers, self._status["n_workers"])

    def _cancel(self, error: BaseException) -> None:
        """Take back what has not run; what runs on is shut out when the output is closed."""
        futures = [future for _, future in self._units.values()]
        with contextlib.suppress(Exception):
            self._client.cancel(futures, force=True)
        if isinstance(error, KeyboardInterrupt):
            logger.warning(
                "Interrupted: %s of %s rows are in %s. Run the same again to go on.",
                f"{self._n_done:,}",
                f"{self._n_done + self._n_left():,}",
                self._output.path,
            )

    def _n_left(self) -> int:
        return (self._cutter.n_rows if self._cutter else 0) + self._n_outstanding_rows

    def _sum_up(self) -> None:
        manifest.record(self._output, self._facts)
        self._report.rows_recomputed = rows_recomputed(
            self._output.starts(), self._output.run, self._rows_of
        )

    def _rows_of(self, name: str) -> int:
        return int(self._note(name)["rows"]) if self._output.has(name) else 0
