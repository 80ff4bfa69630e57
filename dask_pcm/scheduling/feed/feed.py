"""How much of a run is submitted at a time: enough for all lanes, and a little more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dask_pcm.scheduling.feed.sizes import unit_rows

#: Units outstanding per worker at most, however short they are; and units submitted at a time, so
#: that the scheduler's event loop does not stall.
_MAX_WAITING, _MAX_AT_ONCE = 1_000, 100


class DeviceDemand(NamedTuple):
    """The workers of one device model that run a run's work.

    Attributes
    ----------
    row_s
        Seconds per row there; None while unknown.
    """

    device: str
    n_workers: int
    row_s: float | None


class Size(NamedTuple):
    """Size of the next unit, and the device model that it is cut for; empty for any."""

    n_rows: int
    device: str


@dataclass(frozen=True, slots=True)
class UnitSizing:
    """Target sizes of a run's units; see ``pcm.yaml``.

    Attributes
    ----------
    ready_s
        Seconds of work to keep outstanding per worker.
    """

    batch_rows: int
    unit_s: float
    max_rows: int
    n_lanes: int
    ready_s: float


class Feed:
    """The outstanding units of a run (submitted, not collected), and which to submit next."""

    def __init__(self, sizing: UnitSizing) -> None:
        self._sizing = sizing
        self._demand: Sequence[DeviceDemand] = ()
        self._n_units: Counter[str] = Counter()
        self._n_rows: Counter[str] = Counter()
        self._seconds = self._rows = 0.0  # of units that have ended

    def update_demand(self, demand: Sequence[DeviceDemand]) -> None:
        """Take in the gate's report of the workers by device model; empty if unknown."""
        self._demand = demand

    def learn(self, seconds: float, n_rows: int) -> None:
        """`n_rows` rows took `seconds` seconds: the speed where the gate knows none."""
        self._seconds, self._rows = self._seconds + seconds, self._rows + n_rows

    def add(self, device: str, n_rows: int) -> None:
        """A unit was submitted."""
        self._n_units[device] += 1
        self._n_rows[device] += n_rows

    def remove(self, device: str, n_rows: int) -> None:
        """A unit was collected or withdrawn."""
        self._n_units[device] -= 1
        self._n_rows[device] -= n_rows

    def shrink(self, device: str, n_rows: int) -> None:
        """`n_rows` rows of a unit are done already."""
        self._n_rows[device] -= n_rows

    def sizes(self, n_uncut: Callable[[], int]) -> Iterator[Size]:
        """Sizes of the units to submit now, each asked for when the one before was added.

        With several device models, units are cut for each model separately.

        Parameters
        ----------
        n_uncut
            Rows that are in no unit yet.
        """
        for _ in range(_MAX_AT_ONCE):
            size = self._next(n_uncut())
            if size is None:
                return
            yield size

    def _next(self, n_uncut: int) -> Size | None:
        if not n_uncut:
            return None
        demand = self._known_demand()
        # All workers share units cut for any model, or for a model whose workers have left.
        n_workers = sum(one.n_workers for one in demand)
        others = self._n_units.keys() - {one.device for one in demand}
        n_units = sum(self._n_units[device] for device in others) / n_workers
        n_rows = sum(self._n_rows[device] for device in others) / n_workers
        lacking = [one for one in demand if self._lacks(one, n_units, n_rows)]
        if not lacking:
            return None
        one = min(lacking, key=lambda one: self._n_units[one.device] / one.n_workers)
        return Size(self._unit_rows(n_uncut, one, demand), one.device)

    def _known_demand(self) -> list[DeviceDemand]:
        """Models that have workers, with speeds as far as known; one worker if there are none."""
        row_s = self._seconds / self._rows if self._rows else None
        demand = [one._replace(row_s=one.row_s or row_s) for one in self._demand if one.n_workers]
        if len(demand) == 1:
            return [demand[0]._replace(device="")]
        return demand or [DeviceDemand("", 1, row_s)]

    def _lacks(self, one: DeviceDemand, n_units: float, n_rows: float) -> bool:
        """Whether a model's workers need more units, given the shared `n_units` per worker."""
        sizing = self._sizing
        n_units += self._n_units[one.device] / one.n_workers
        n_rows += self._n_rows[one.device] / one.n_workers
        if n_units >= _MAX_WAITING:
            return False
        return (
            n_units < sizing.n_lanes + 1 or (one.row_s or sizing.ready_s) * n_rows < sizing.ready_s
        )

    def _unit_rows(self, n_uncut: int, one: DeviceDemand, demand: Sequence[DeviceDemand]) -> int:
        sizing = self._sizing
        # Workers of other models, converted to the speed of this one.
        as_fast = [
            other.n_workers * (one.row_s / other.row_s if one.row_s and other.row_s else 1.0)
            for other in demand
        ]
        return unit_rows(
            n_uncut, sum(as_fast), sizing.batch_rows, one.row_s, sizing.unit_s, sizing.max_rows
        )
