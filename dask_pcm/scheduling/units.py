"""Guided self-scheduling: each unit is a share of the remaining rows, so all workers end together.

Polychronopoulos & Kuck, "Guided self-scheduling" (IEEE Trans. Computers, 1987). Units shrink as
the work runs out. The share is weighted by speed: a worker that takes half the time per row gets
twice the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Size of the next unit, as a fraction of a worker's equal share of the remaining rows.
SHARE = 0.5
#: Units outstanding per worker at most, however short they are; and units submitted at a time, so
#: that the scheduler's event loop does not stall.
_MAX_WAITING, _MAX_AT_ONCE = 1_000, 100
#: The first call has at least this many rows, however many workers there are.
_FEW_ROWS = 32
#: Pieces are combined into one unit if this many of them fit in it; larger ones stay separate.
_SMALL = 8


def unit_rows(
    n_remaining: int,
    n_workers: float,
    batch_rows: int,
    row_s: float | None,
    unit_s: float,
    max_rows: int,
) -> int:
    """Rows of the next unit.

    Parameters
    ----------
    n_remaining
        Rows that are in no unit yet.
    n_workers
        Workers that share them, in multiples of the speed of the worker that the unit is for.
    batch_rows
        Rows per call of the function. Every unit but the last has at least as many, unless a call
        takes longer than `unit_s`: then the last units, and their calls, may be smaller.
    row_s
        Learned seconds per row; None before the first unit has ended.
    unit_s
        Target duration of a unit, in seconds.
    max_rows
        Upper limit of a unit.

    Examples
    --------
    >>> [unit_rows(n, 2, 32, 0.001, 1.0, 10**6) for n in (100_000, 1_000, 100, 20)]
    [1000, 250, 32, 20]
    >>> [unit_rows(n, 2, 500, 0.01, 1.0, 10**6) for n in (10_000, 1_600, 100)]
    [500, 400, 100]
    """
    share = int(n_remaining * SHARE / max(1.0, n_workers))
    if row_s is None:  # one call, capped at a share: the first units must not occupy all workers
        return max(1, min(batch_rows, max(share, _FEW_ROWS), n_remaining))
    aimed = max(1, int(min(max_rows, unit_s / max(row_s, 1e-12))))
    least = min(batch_rows, aimed) if share < batch_rows else batch_rows
    return min(max(min(share, max(aimed, batch_rows), max_rows), least), n_remaining)


def rows_of(n_piece: int, n_wanted: int, batch_rows: int) -> int:
    """Rows that a unit takes of a piece of `n_piece` rows.

    Whole batches; the whole piece if less than half a batch would be left.

    >>> [rows_of(n, 70, 32) for n in (50, 79, 80, 500)]
    [50, 79, 64, 64]
    """
    if n_wanted > batch_rows:
        n_wanted -= n_wanted % batch_rows
    if n_wanted >= batch_rows and n_piece - n_wanted < batch_rows // 2:
        return n_piece
    return min(n_wanted, n_piece)


def goes_along(n_piece: int, n_taken: int, n_wanted: int, batch_rows: int) -> bool:
    """Whether a unit also takes rows of the next piece: up to a batch, then whole small pieces."""
    room = n_wanted - n_taken
    is_small = n_piece * _SMALL <= n_wanted and n_piece <= room
    return room > 0 and (n_taken < batch_rows or is_small)


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


class Outstanding:
    """The outstanding units of a run: submitted and not collected yet."""

    def __init__(self, sizing: UnitSizing) -> None:
        self._sizing = sizing
        self._n_units: Counter[str] = Counter()
        self._n_rows: Counter[str] = Counter()

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

    def next(self, n_uncut: int, demand: Sequence[DeviceDemand], n_fed: int) -> Size | None:
        """Size of the next unit to submit; None if enough are outstanding.

        With several device models, units are cut for each model separately.

        Parameters
        ----------
        n_uncut
            Rows that are in no unit yet.
        demand
            Workers by device model; empty if unknown, which counts as one worker.
        n_fed
            Units submitted in this call of the window.
        """
        if not n_uncut or n_fed >= _MAX_AT_ONCE:
            return None
        demand = [one for one in demand if one.n_workers] or [DeviceDemand("", 1, None)]
        if len(demand) == 1:
            demand = [demand[0]._replace(device="")]
        # All workers share units cut for any model, or for a model whose workers have left.
        n_workers = sum(one.n_workers for one in demand)
        others = self._n_units.keys() - {one.device for one in demand}
        n_units = sum(self._n_units[device] for device in others) / n_workers
        n_rows = sum(self._n_rows[device] for device in others) / n_workers
        lacking = [one for one in demand if self._lacks(one, n_units, n_rows)]
        if not lacking:
            return None
        one = min(lacking, key=lambda one: self._n_units[one.device] / one.n_workers)
        return Size(self._rows(n_uncut, one, demand), one.device)

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

    def _rows(self, n_uncut: int, one: DeviceDemand, demand: Sequence[DeviceDemand]) -> int:
        sizing = self._sizing
        # Workers of other models, converted to the speed of this one.
        as_fast = [
            other.n_workers * (one.row_s / other.row_s if one.row_s and other.row_s else 1.0)
            for other in demand
        ]
        return unit_rows(
            n_uncut, sum(as_fast), sizing.batch_rows, one.row_s, sizing.unit_s, sizing.max_rows
        )
