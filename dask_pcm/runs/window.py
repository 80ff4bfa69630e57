"""The window of a run: units that are cut, handed over, and not taken in yet."""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Container, Iterator, Sequence
from typing import Any

import dask
from dask.utils import key_split
from distributed import Client, Future

from dask_pcm.config import Config
from dask_pcm.runs.cutter import Cutter
from dask_pcm.runs.plan import Plan, Unit
from dask_pcm.runs.units.unit import UnitSpec, run_unit
from dask_pcm.scheduling.units import DeviceDemand, Outstanding, UnitSizing


class Window:
    """Keeps enough units at hand for the workers, so that a run of any length costs as little.

    Used by one thread.
    """

    def __init__(self, client: Client, plan: Plan, job: UnitSpec, config: Config) -> None:
        self._client = client
        self._plan = plan
        self.job = job
        wants = (config.unit_s, config.max_unit_rows, config.n_lanes, config.ready_s)
        self._stock = Outstanding(UnitSizing(plan.batch_rows, *wants))
        #: What is still to be cut; nothing until stock has been taken.
        self.cutter = Cutter(plan, [(0, plan.n_rows)], frozenset(range(plan.n_partitions)))
        self._held: list[Unit] = []  # taken back while the run is paused
        self._units: dict[str, tuple[Unit, Future]] = {}  # outstanding, by key
        self._cut_for: dict[str, str] = {}  # device models, by the names of units
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._n_keys = 0
        #: What the keys of units have in common, as the gate sees it.
        self.kind = key_split(self._key(0, ""))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to be cut, handed over or waited for."""
        return self.cutter.is_empty and not self._units and not self._held

    def __len__(self) -> int:
        """Units that are handed over."""
        return len(self._units)

    def feed(self, askers: Sequence[DeviceDemand]) -> None:
        """Keep the lanes of all workers filled and a little more at hand."""
        units, self._held = self._held, []
        for unit in units:
            self._stock.add("", unit.n_rows or 1)
        while not self.cutter.is_empty:
            size = self._stock.next(self.cutter.n_rows, askers, len(units))
            if size is None:
                break
            unit = self.cutter.cut(size.n_rows)
            self._cut_for[unit.name] = size.device
            self._stock.add(size.device, unit.n_rows or 1)
            units.append(unit)
        for _, alike in itertools.groupby(units, key=self._annotations):
            self._submit(list(alike))

    def _annotations(self, unit: Unit) -> dict[str, Any]:
        """What the gate is told of a unit."""
        return {"pcm_rows": unit.n_rows or 1, "pcm_cut_for": self._cut_for.get(unit.name, "")}

    def _submit(self, units: list[Unit]) -> None:
        """Hand over units that are alike to the gate."""
        first = self._n_keys + 1
        self._n_keys += len(units)
        graphs, keys, inputs = zip(*map(self._plan.graph, units), strict=True)
        with dask.annotate(**self._annotations(units[0])):
            futures = self._client.map(
                run_unit,
                units,
                graphs,
                keys,
                inputs,
                job=self.job,
                refs=self._plan.refs,
                key=[self._key(first + n, unit.name) for n, unit in enumerate(units)],
                pure=False,
            )
        for unit, future in zip(units, futures, strict=True):
            self._units[future.key] = (unit, future)
            future.add_done_callback(self._finished.put)

    def _key(self, number: int, name: str) -> str:
        stem = name.removesuffix(".parquet")
        return f"{self._plan.label}_unit-{self.job.output.run}-{number}-{stem}"

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
        self._drop(future.key)
        future.release()

    def _drop(self, key: str) -> Unit:
        unit, _ = self._units.pop(key)
        self._stock.remove(self._cut_for.pop(unit.name, ""), unit.n_rows or 1)
        return unit

    def hold_back(self, on_workers: Container[Any] | None) -> None:
        """Take back the units that no worker has yet; they are handed over again as they are.

        Cut anew, one that has been begun in this moment would have rows in common with another.
        Where nobody knows what workers have, nothing is taken back.
        """
        if on_workers is None:
            return
        waiting = [key for key, (_, future) in self._units.items() if future.status == "pending"]
        taken = [key for key in waiting if key not in on_workers]
        futures = []
        for key in taken:
            futures.append(self._units[key][1])
            self._held.append(self._drop(key))
        self._client.cancel(futures, force=True)

    def cancel(self) -> None:
        """Take back all that has not run."""
        self._client.cancel([future for _, future in self._units.values()], force=True)
