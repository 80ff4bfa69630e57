"""How large the next unit is, and how many are kept at hand: guided self-scheduling.

Polychronopoulos & Kuck, "Guided self-scheduling" (IEEE Trans. Computers, 1987): each unit is a
share of what remains, so that units shrink as the work runs out and the last ones end together.
Here the share is the asker's: a worker that does a row in half the time has twice as large a one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: The part of the asker's share of what remains that the next unit takes.
SHARE = 0.5
#: Units at hand for each worker, however short they are; and those handed over at a time, as the
#: scheduler's loop is not to stall.
_MAX_WAITING, _MAX_AT_ONCE = 1_000, 100
#: A first call is not made smaller than this, however many workers there are.
_FEW_ROWS = 32
#: Pieces of which so many fit in a unit are put together; larger ones are units of their own.
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
        Rows that no unit has taken yet.
    n_workers
        Workers that share them, counted in workers as fast as the asker.
    batch_rows
        Rows of one call: no unit but the last is smaller, unless a call takes longer than `unit_s`.
        Then shares may become smaller than that at the end, and calls with them.
    row_s
        Learned seconds a row; None before the first unit has ended.
    unit_s
        Seconds of work that a unit aims for.
    max_rows
        No unit is larger.

    Examples
    --------
    >>> [unit_rows(n, 2, 32, 0.001, 1.0, 10**6) for n in (100_000, 1_000, 100, 20)]
    [1000, 250, 32, 20]
    >>> [unit_rows(n, 2, 500, 0.01, 1.0, 10**6) for n in (10_000, 1_600, 100)]
    [500, 400, 100]
    """
    share = int(n_remaining * SHARE / max(1.0, n_workers))
    if row_s is None:  # a call, unless that is more than a share and not small anyhow
        return max(1, min(batch_rows, max(share, _FEW_ROWS), n_remaining))
    aimed = max(1, int(min(max_rows, unit_s / max(row_s, 1e-12))))
    least = min(batch_rows, aimed) if share < batch_rows else batch_rows
    return min(max(min(share, max(aimed, batch_rows), max_rows), least), n_remaining)


def rows_of(n_piece: int, n_wanted: int, batch_rows: int) -> int:
    """Of a piece with so many rows, those that a unit takes.

    Whole batches, and not so that less than half of one would be left.

    >>> [rows_of(n, 70, 32) for n in (50, 79, 80, 500)]
    [50, 79, 64, 64]
    """
    if n_wanted > batch_rows:
        n_wanted -= n_wanted % batch_rows
    if n_wanted >= batch_rows and n_piece - n_wanted < batch_rows // 2:
        return n_piece
    return min(n_wanted, n_piece)


def goes_along(n_piece: int, n_taken: int, n_wanted: int, batch_rows: int) -> bool:
    """Whether some of the next piece is taken along with what a unit has: up to a batch, and after
    that, whole pieces while they are small."""
    room = n_wanted - n_taken
    is_small = n_piece * _SMALL <= n_wanted and n_piece <= room
    return room > 0 and (n_taken < batch_rows or is_small)


class DeviceDemand(NamedTuple):
    """Workers of one device model that a run's work goes to.

    Attributes
    ----------
    row_s
        Seconds that a row takes there; None before that is known.
    """

    device: str
    n_workers: int
    row_s: float | None


class Size(NamedTuple):
    """What the next unit is to be: how many rows, for which device model."""

    n_rows: int
    device: str


@dataclass(frozen=True, slots=True)
class UnitSizing:
    """What a run wants of its units; see ``pcm.yaml``."""

    batch_rows: int
    unit_s: float
    max_rows: int
    n_lanes: int
    ready_s: float


class Outstanding:
    """The units of a run that are handed over and not taken in: enough that no worker waits."""

    def __init__(self, wants: UnitSizing) -> None:
        self._wants = wants
        self._n_units: Counter[str] = Counter()
        self._n_rows: Counter[str] = Counter()

    def add(self, device: str, n_rows: int) -> None:
        """A unit is handed over."""
        self._n_units[device] += 1
        self._n_rows[device] += n_rows

    def remove(self, device: str, n_rows: int) -> None:
        """A unit is taken in, or taken back."""
        self._n_units[device] -= 1
        self._n_rows[device] -= n_rows

    def shrink(self, device: str, n_rows: int) -> None:
        """So many rows of a unit need not be done any more."""
        self._n_rows[device] -= n_rows

    def next(self, n_uncut: int, askers: Sequence[DeviceDemand], n_fed: int) -> Size | None:
        """The next unit to hand over, after `n_fed` at this time; None where there are enough.

        Units are cut for each device model apart, where there are several.
        """
        if not n_uncut or n_fed >= _MAX_AT_ONCE:
            return None
        askers = [one for one in askers if one.n_workers] or [DeviceDemand("", 1, None)]
        if len(askers) == 1:
            askers = [askers[0]._replace(device="")]
        # What was cut for nobody in particular, or for those that are gone, everybody takes.
        n_workers = sum(one.n_workers for one in askers)
        others = self._n_units.keys() - {one.device for one in askers}
        n_units = sum(self._n_units[device] for device in others) / n_workers
        n_rows = sum(self._n_rows[device] for device in others) / n_workers
        lacking = [one for one in askers if self._lacks(one, n_units, n_rows)]
        if not lacking:
            return None
        one = min(lacking, key=lambda one: self._n_units[one.device] / one.n_workers)
        return Size(self._rows(n_uncut, one, askers), one.device)

    def _lacks(self, one: DeviceDemand, n_units: float, n_rows: float) -> bool:
        """Whether more is to be handed over; others leave so much for each worker."""
        wants = self._wants
        n_units += self._n_units[one.device] / one.n_workers
        n_rows += self._n_rows[one.device] / one.n_workers
        if n_units >= _MAX_WAITING:
            return False
        return n_units < wants.n_lanes + 1 or (one.row_s or wants.ready_s) * n_rows < wants.ready_s

    def _rows(self, n_uncut: int, one: DeviceDemand, askers: Sequence[DeviceDemand]) -> int:
        wants = self._wants
        as_fast = [
            other.n_workers * (one.row_s / other.row_s if one.row_s and other.row_s else 1.0)
            for other in askers
        ]
        return unit_rows(
            n_uncut, sum(as_fast), wants.batch_rows, one.row_s, wants.unit_s, wants.max_rows
        )
