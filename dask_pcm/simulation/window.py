"""The window of a simulated run: what ``ledger/window.py`` and ``ledger/cut.py`` do, without files.

It and ``gate.py`` are all that knows the gate's own code.
"""

from __future__ import annotations

from dataclasses import dataclass

from dask_pcm.config import Config
from dask_pcm.scheduling.units import unit_rows
from dask_pcm.simulation.scenario import RunSpec

#: As in ``ledger/window.py`` and ``ledger/cut.py``.
_MAX_WAITING, _MAX_AT_ONCE, _SMALL = 1_000, 100, 8


@dataclass(slots=True, eq=False)
class Unit:
    """Rows that are handed over as a whole, the `number`-th of their run."""

    number: int
    run: RunSpec
    n_rows: int

    @property
    def key(self) -> tuple[str, int]:
        return self.run.name, self.number


class Window:
    """Cuts a run's pieces into units, and keeps enough of them at hand for the workers."""

    def __init__(self, run: RunSpec, config: Config) -> None:
        self.run = run
        self._config = config
        self.n_uncut = run.n_rows
        self.units: dict[tuple[str, int], Unit] = {}  # handed over
        self._n_rows = 0  # in these
        self._n_keys = 0
        self._seconds = self._rows_done = 0.0

    @property
    def is_empty(self) -> bool:
        return not self.n_uncut and not self.units

    def feed(self, n_workers: int) -> list[Unit]:
        """Units to hand over now, so that lanes are filled and a little more is at hand."""
        row_s = self._seconds / self._rows_done if self._rows_done else None
        n_wanted = n_workers * (self._config.n_lanes + 1)
        enough_s = n_workers * self._config.ready_s
        fed: list[Unit] = []
        while self.n_uncut:
            n_units = len(self.units)
            is_enough = n_units >= n_wanted and (row_s or enough_s) * self._n_rows >= enough_s
            if is_enough or n_units >= n_workers * _MAX_WAITING or len(fed) >= _MAX_AT_ONCE:
                break
            config = self._config
            wanted = unit_rows(
                self.n_uncut,
                n_workers,
                self.run.batch_rows,
                row_s,
                config.unit_s,
                config.max_unit_rows,
            )
            fed.append(self._add(self._cut(wanted)))
        return fed

    def pieces(self) -> list[Unit]:
        """All at once: each piece is a task."""
        cut = []
        while self.n_uncut:
            cut.append(self._add(min(self.run.task_rows, self.n_uncut)))
        return cut

    def ended(self, key: tuple[str, int], seconds: float) -> None:
        """A unit is committed; it took so long to infer, this time."""
        unit = self.units.pop(key)
        self._n_rows -= unit.n_rows
        self._seconds, self._rows_done = self._seconds + seconds, self._rows_done + unit.n_rows

    def failed(self, key: tuple[str, int]) -> None:
        self._n_rows -= self.units.pop(key).n_rows

    def shrink(self, unit: Unit, n_rows: int) -> None:
        """So many rows of a unit are in its journal."""
        unit.n_rows -= n_rows
        self._n_rows -= n_rows

    def _add(self, n_rows: int) -> Unit:
        self._n_keys += 1
        self.n_uncut -= n_rows
        unit = Unit(self._n_keys, self.run, n_rows)
        self.units[unit.key] = unit
        self._n_rows += n_rows
        return unit

    def _cut(self, wanted: int) -> int:
        """Rows of a piece, and of those after it up to a batch, or while they are small."""
        batch, left = self.run.batch_rows, self.n_uncut
        begun = (self.run.n_rows - left) % self.run.task_rows
        rows = self._take(min(self.run.task_rows - begun, left), wanted)
        is_whole = rows == min(self.run.task_rows - begun, left)
        while is_whole and rows < left and (room := max(wanted, batch) - rows) > 0:
            piece = min(self.run.task_rows, left - rows)
            is_small = piece * _SMALL <= wanted and piece <= room
            if rows >= batch and not is_small:
                break
            taken = self._take(piece, room)
            rows, is_whole = rows + taken, taken == piece
        return rows

    def _take(self, piece: int, wanted: int) -> int:
        """Whole batches of a piece, and not so that little is left of it."""
        batch = self.run.batch_rows
        if wanted > batch:
            wanted -= wanted % batch
        if piece - wanted < batch // 2 and wanted >= batch:
            return piece
        return min(wanted, piece)
