"""The window of a run: units that are cut, handed over, and not taken in yet."""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Iterator

import dask
from dask.utils import key_split
from distributed import Client, Future

from dask_pcm.config import Config
from dask_pcm.ledger.cut import Cutter
from dask_pcm.ledger.plan import Plan, Unit
from dask_pcm.ledger.unit import Job, run_unit
from dask_pcm.scheduling.units import unit_rows

_MAX_WAITING = 1_000  # units at the gate for each worker, however short they are
_MAX_AT_ONCE = 100  # units in one graph: the scheduler's loop is not to stall


class Window:
    """Keeps enough units at hand for the workers, so that a run of any length costs as little.

    Used by one thread.
    """

    def __init__(self, client: Client, plan: Plan, job: Job, config: Config) -> None:
        self._client = client
        self._plan = plan
        self.job = job
        self._config = config
        #: What is still to be cut; nothing until stock has been taken.
        self.cutter = Cutter(plan, [(0, plan.n_rows)], frozenset(range(plan.n_partitions)))
        self._held: list[Unit] = []  # taken back while the run is paused
        self._units: dict[str, tuple[Unit, Future]] = {}  # outstanding, by key
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._n_keys = self._n_outstanding_rows = 0
        #: What the keys of units have in common, as the gate sees it.
        self.kind = key_split(self._key(0))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to be cut, handed over or waited for."""
        return self.cutter.is_empty and not self._units and not self._held

    def __len__(self) -> int:
        """Units that are handed over."""
        return len(self._units)

    def feed(self, n_workers: int, row_s: float | None) -> None:
        """Keep the lanes of `n_workers` filled and a little more at hand.

        `row_s` are the seconds that a row takes, None before that is known.
        """
        n_wanted = n_workers * (self._config.n_lanes + 1)
        enough_s = n_workers * self._config.ready_s
        units, self._held = self._held, []
        self._n_outstanding_rows += sum(unit.n_rows or 1 for unit in units)
        while not self.cutter.is_empty:
            n_units = len(self._units) + len(units)
            ready_s = (row_s or enough_s) * self._n_outstanding_rows
            is_enough = n_units >= n_wanted and ready_s >= enough_s
            if is_enough or n_units >= n_workers * _MAX_WAITING or len(units) >= _MAX_AT_ONCE:
                break
            n_rows = unit_rows(
                self.cutter.n_rows,
                n_workers,
                self._plan.batch_rows,
                row_s,
                self._config.unit_s,
                self._config.max_unit_rows,
            )
            unit = self.cutter.cut(n_rows)
            units.append(unit)
            self._n_outstanding_rows += unit.n_rows or 1
        for _, alike in itertools.groupby(units, key=lambda unit: unit.n_rows or 1):
            self._submit(list(alike))

    def _submit(self, units: list[Unit]) -> None:
        """Hand over units of as many rows each."""
        first = self._n_keys + 1
        self._n_keys += len(units)
        graphs, keys, inputs = zip(*map(self._plan.graph, units), strict=True)
        with dask.annotate(pcm_rows=units[0].n_rows or 1):
            futures = self._client.map(
                run_unit,
                units,
                graphs,
                keys,
                inputs,
                job=self.job,
                refs=self._plan.refs,
                key=[self._key(number) for number in range(first, self._n_keys + 1)],
                pure=False,
            )
        for unit, future in zip(units, futures, strict=True):
            self._units[future.key] = (unit, future)
            future.add_done_callback(self._finished.put)

    def _key(self, number: int) -> str:
        return f"{self._plan.label}_unit-{self.job.output.run}-{number}"

    def ended(self, wait_s: float) -> list[tuple[Unit, Future]]:
        """Units that have ended, whatever way; wait so many seconds if none has."""
        ended = []
        for future in self._arrivals(wait_s):
            if future.key not in self._units:
                continue
            if future.status in ("pending", "lost"):  # its worker died with the result
                future.add_done_callback(self._finished.put)
            else:
                ended.append(self._units[future.key])
        return ended

    def _arrivals(self, wait_s: float) -> Iterator[Future]:
        with contextlib.suppress(queue.Empty):
            yield self._finished.get(timeout=wait_s)
            while True:
                yield self._finished.get_nowait()

    def take_out(self, future: Future) -> None:
        """A unit has been taken in."""
        unit, _ = self._units.pop(future.key)
        self._n_outstanding_rows -= unit.n_rows or 1
        future.release()

    def hold_back(self) -> None:
        """Take back the units that no worker has yet; they are handed over again as they are.

        Cut anew, one that has been begun in this moment would have rows in common with another.
        """
        on_workers = {key for keys in self._client.processing().values() for key in keys}
        waiting = [key for key, (_, future) in self._units.items() if future.status == "pending"]
        taken = [key for key in waiting if key not in on_workers]
        futures = []
        for key in taken:
            unit, future = self._units.pop(key)
            futures.append(future)
            self._held.append(unit)
            self._n_outstanding_rows -= unit.n_rows or 1
        self._client.cancel(futures, force=True)

    def cancel(self) -> None:
        """Take back all that has not run."""
        self._client.cancel([future for _, future in self._units.values()], force=True)
