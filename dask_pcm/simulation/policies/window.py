"""The window of a simulated run: ``runs/window.py`` and ``runs/cutter.py`` without files.

Only this module and ``gate.py`` depend on the gate's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dask_pcm.config import Config
from dask_pcm.scheduling.units import DeviceDemand, Outstanding, UnitSizing, goes_along, rows_of
from dask_pcm.simulation.scenario.scenario import RunSpec


@dataclass(slots=True, eq=False)
class Unit:
    """Rows submitted as a whole; `number` counts the units of a run."""

    number: int
    run: RunSpec
    n_rows: int
    cut_for: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Key of the unit at the gate."""
        return self.run.name, self.number


class Window:
    """Cuts a run's pieces into units, and keeps enough of them outstanding for the workers."""

    def __init__(self, run: RunSpec, config: Config) -> None:
        self.run = run
        wants = (config.unit_s, config.max_unit_rows, config.n_lanes, config.ready_s)
        self._outstanding = Outstanding(UnitSizing(run.batch_rows, *wants))
        self.n_uncut = run.n_rows
        self.units: dict[tuple[str, int], Unit] = {}  # outstanding
        self._n_keys = 0
        self._demand: list[DeviceDemand] = []
        self._seconds = self._rows_done = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether all rows are cut, and no unit is outstanding."""
        return not self.n_uncut and not self.units

    def update_demand(self, demand: Sequence[DeviceDemand]) -> None:
        """Take in the gate's report of the workers by device model, and their speeds."""
        self._demand = list(demand)

    def feed(self) -> list[Unit]:
        """Cut and return the units to submit now: enough to fill all lanes, and a little more."""
        row_s = self._seconds / self._rows_done if self._rows_done else None
        demand = [one._replace(row_s=one.row_s or row_s) for one in self._demand]
        fed: list[Unit] = []
        while (size := self._outstanding.next(self.n_uncut, demand, len(fed))) is not None:
            fed.append(self._add(self._cut(size.n_rows), size.device))
        return fed

    def pieces(self) -> list[Unit]:
        """Cut everything: each piece is one task."""
        cut = []
        while self.n_uncut:
            cut.append(self._add(min(self.run.task_rows, self.n_uncut)))
        return cut

    def ended(self, key: tuple[str, int], seconds: float) -> None:
        """A unit was committed; its last attempt inferred for `seconds` seconds."""
        unit = self._drop(key)
        self._seconds, self._rows_done = self._seconds + seconds, self._rows_done + unit.n_rows

    def failed(self, key: tuple[str, int]) -> None:
        """A unit has failed for good."""
        self._drop(key)

    def _drop(self, key: tuple[str, int]) -> Unit:
        unit = self.units.pop(key)
        self._outstanding.remove(unit.cut_for, unit.n_rows)
        return unit

    def shrink(self, unit: Unit, n_rows: int) -> None:
        """`n_rows` rows of a unit are in its journal, and need no inference."""
        unit.n_rows -= n_rows
        self._outstanding.shrink(unit.cut_for, n_rows)

    def _add(self, n_rows: int, cut_for: str = "") -> Unit:
        self._n_keys += 1
        self.n_uncut -= n_rows
        unit = Unit(self._n_keys, self.run, n_rows, cut_for)
        self.units[unit.key] = unit
        self._outstanding.add(cut_for, n_rows)
        return unit

    def _cut(self, wanted: int) -> int:
        """Rows of the next unit: of one piece, then of the next up to a batch or while small."""
        batch, left = self.run.batch_rows, self.n_uncut
        begun = (self.run.n_rows - left) % self.run.task_rows
        piece = min(self.run.task_rows - begun, left)
        rows = rows_of(piece, wanted, batch)
        is_whole = rows == piece
        while is_whole and rows < left:
            piece = min(self.run.task_rows, left - rows)
            if not goes_along(piece, rows, wanted, batch):
                break
            taken = rows_of(piece, wanted - rows, batch)
            rows, is_whole = rows + taken, taken == piece
        return rows
