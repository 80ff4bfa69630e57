"""How large the next unit is: guided self-scheduling.

Polychronopoulos & Kuck, "Guided self-scheduling" (IEEE Trans. Computers, 1987): each unit is a
share of what remains, so that units shrink as the work runs out and the last ones end together.
"""

from __future__ import annotations

#: The part of an equal share of what remains that the next unit takes.
SHARE = 0.5


def unit_rows(
    n_remaining: int,
    n_workers: int,
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
        Workers that share them.
    batch_rows
        Rows of one call: no unit but the last is smaller.
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
    """
    if row_s is None:
        wanted = batch_rows
    else:
        aimed = max_rows if row_s <= 0 else int(unit_s / row_s)
        wanted = min(int(n_remaining * SHARE / max(1, n_workers)), aimed, max_rows)
    return min(max(wanted, batch_rows, 1), n_remaining)
