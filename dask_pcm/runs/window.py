"""The window of a run: the units that are submitted and not collected yet."""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Container, Iterator, Sequence
from typing import Any

import dask
from distributed import Client, Future

from dask_pcm.config import Config
from dask_pcm.runs.cutter import Cutter
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.units.graph import Unit
from dask_pcm.runs.units.run_unit import run_unit
from dask_pcm.runs.units.unit import UnitSpec
from dask_pcm.scheduling.feed.feed import DeviceDemand, Feed, UnitSizing


class Window:
    """Keeps enough units outstanding for the workers, so the scheduler holds few of any run.

    Used by one thread.

    Attributes
    ----------
    cutter
        What is not cut into units yet.
    """

    def __init__(
        self, client: Client, plan: Plan, spec: UnitSpec, cutter: Cutter, config: Config
    ) -> None:
        self._client = client
        self._plan = plan
        self._spec = spec
        self.cutter = cutter
        targets = (config.unit_s, config.max_unit_rows, config.n_lanes, config.ready_s)
        self._feed = Feed(UnitSizing(plan.batch_rows, *targets))
        self._withdrawn: list[Unit] = []  # while the run is paused
        self._units: dict[str, tuple[Unit, Future]] = {}  # outstanding, by key
        self._cut_for: dict[str, str] = {}  # device models, by the names of units
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._n_keys = 0

    @property
    def is_empty(self) -> bool:
        """Whether every row is cut, and every unit collected."""
        return self.cutter.is_empty and not self._units and not self._withdrawn

    def __len__(self) -> int:
        """Units outstanding."""
        return len(self._units)

    def feed(self, demand: Sequence[DeviceDemand]) -> None:
        """Submit enough units to fill the lanes of all workers, and a little more."""
        units, self._withdrawn = self._withdrawn, []
        for unit in units:
            self._feed.add("", unit.n_rows or 1)
        self._feed.update_demand(demand)
        for size in self._feed.sizes(lambda: self.cutter.n_rows):
            unit = self.cutter.cut(size.n_rows)
            self._cut_for[unit.name] = size.device
            self._feed.add(size.device, unit.n_rows or 1)
            units.append(unit)
        for _, alike in itertools.groupby(units, key=self._annotations):
            self._submit(list(alike))

    def learn(self, seconds: float, n_rows: int) -> None:
        """A unit inferred `n_rows` rows in `seconds` seconds."""
        self._feed.learn(seconds, n_rows)

    def _annotations(self, unit: Unit) -> dict[str, Any]:
        """What the gate knows of a unit."""
        return {"pcm_rows": unit.n_rows or 1, "pcm_cut_for": self._cut_for.get(unit.name, "")}

    def _submit(self, units: list[Unit]) -> None:
        """Submit units with the same annotations."""
        self._plan.start_below(self._client)
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
                spec=self._spec,
                refs=self._plan.refs,
                key=[self._key(first + n, unit.name) for n, unit in enumerate(units)],
                pure=False,
            )
        for unit, future in zip(units, futures, strict=True):
            self._units[future.key] = (unit, future)
            future.add_done_callback(self._finished.put)

    def _key(self, number: int, name: str) -> str:
        return unit_key(self._plan, self._spec.output.run, number, name)

    def ended(self, wait_s: float) -> list[tuple[Unit, Future]]:
        """Units that have ended: finished, failed or cancelled. Waits up to `wait_s` for one."""
        ended = []
        for future in self._arrivals(wait_s):
            # Withdrawn or collected meanwhile; its callback had been queued before.
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

    def collected(self, future: Future) -> None:
        """The result of a unit is here."""
        self._drop(future.key)
        future.release()

    def _drop(self, key: str) -> Unit:
        unit, _ = self._units.pop(key)
        self._feed.remove(self._cut_for.pop(unit.name, ""), unit.n_rows or 1)
        return unit

    def withdraw(self, on_workers: Container[Any] | None) -> None:
        """Withdraw the units that no worker has yet; ``feed`` submits them again as they are.

        Not cut anew: a worker may begin one at this moment, and another unit must not have some of
        its rows. Nothing is withdrawn where it is unknown which units workers have (None).
        """
        if on_workers is None:
            return
        waiting = [key for key, (_, future) in self._units.items() if future.status == "pending"]
        futures = []
        for key in waiting:
            if key not in on_workers:
                futures.append(self._units[key][1])
                self._withdrawn.append(self._drop(key))
        self._client.cancel(futures, force=True)

    def cancel(self) -> None:
        """Cancel all outstanding units."""
        self._client.cancel([future for _, future in self._units.values()], force=True)


def unit_key(plan: Plan, run: str, number: int = 0, name: str = "") -> str:
    """Dask key of a unit; dashboards and the gate group units by what precedes the first dash."""
    return f"{plan.label}_unit-{run}-{number}-{name.removesuffix('.parquet')}"
