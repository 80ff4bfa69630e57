"""The window of a simulated run: ``runs/window.py`` and ``runs/cutter.py`` without files.

Only this module, ``drivers.py`` and ``gate.py`` depend on the gate's code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dask_pcm.config import Config
from dask_pcm.scheduling.feed.feed import DeviceDemand, Feed, UnitSizing
from dask_pcm.scheduling.feed.sizes import cut_pieces
from dask_pcm.simulation.scenario.scenario import RunSpec


@dataclass(slots=True, eq=False)
class SimulatedUnit:
    """Rows submitted as a whole; `number` counts the units of a run."""

    number: int
    run: RunSpec
    n_rows: int
    cut_for: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Key of the unit at the gate."""
        return self.run.name, self.number


class SimulatedWindow:
    """Cuts a run's pieces into units, and keeps enough of them outstanding for the workers."""

    def __init__(self, run: RunSpec, config: Config) -> None:
        self.run = run
        wants = (config.unit_s, config.max_unit_rows, config.n_lanes, config.ready_s)
        self._feed = Feed(UnitSizing(run.batch_rows, *wants))
        self.n_uncut = run.n_rows
        self.units: dict[tuple[str, int], SimulatedUnit] = {}  # outstanding
        self._n_keys = 0

    @property
    def is_empty(self) -> bool:
        """Whether all rows are cut, and no unit is outstanding."""
        return not self.n_uncut and not self.units

    def update_demand(self, demand: Sequence[DeviceDemand]) -> None:
        """Take in the gate's report of the workers by device model, and their speeds."""
        self._feed.update_demand(demand)

    def feed(self) -> list[SimulatedUnit]:
        """Cut and return the units to submit now: enough to fill all lanes, and a little more."""
        sizes = self._feed.sizes(lambda: self.n_uncut)
        return [self._add(self._cut(size.n_rows), size.device) for size in sizes]

    def pieces(self) -> list[SimulatedUnit]:
        """Cut everything: each piece is one task."""
        cut = []
        while self.n_uncut:
            cut.append(self._add(min(self.run.task_rows, self.n_uncut)))
        return cut

    def ended(self, key: tuple[str, int], seconds: float) -> None:
        """A unit was committed; its last attempt inferred for `seconds` seconds."""
        unit = self._drop(key)
        self._feed.learn(seconds, unit.n_rows)

    def failed(self, key: tuple[str, int]) -> None:
        """A unit has failed for good."""
        self._drop(key)

    def _drop(self, key: tuple[str, int]) -> SimulatedUnit:
        unit = self.units.pop(key)
        self._feed.remove(unit.cut_for, unit.n_rows)
        return unit

    def shrink(self, unit: SimulatedUnit, n_rows: int) -> None:
        """`n_rows` rows of a unit are in its journal, and need no inference."""
        unit.n_rows -= n_rows
        self._feed.shrink(unit.cut_for, n_rows)

    def _add(self, n_rows: int, cut_for: str = "") -> SimulatedUnit:
        self._n_keys += 1
        self.n_uncut -= n_rows
        unit = SimulatedUnit(self._n_keys, self.run, n_rows, cut_for)
        self.units[unit.key] = unit
        self._feed.add(cut_for, n_rows)
        return unit

    def _cut(self, n_wanted: int) -> int:
        """Rows of the next unit."""
        return sum(cut_pieces(self._pieces_ahead(), n_wanted, self.run.batch_rows))

    def _pieces_ahead(self) -> Iterator[int]:
        """Rows of each piece that is not cut yet, the first of them perhaps in part."""
        n_left = self.n_uncut
        n_piece = self.run.task_rows - (self.run.n_rows - n_left) % self.run.task_rows
        while n_left:
            n_piece = min(n_piece, n_left)
            yield n_piece
            n_left, n_piece = n_left - n_piece, self.run.task_rows
