"""Guided self-scheduling: each unit is a share of the remaining rows, so all workers end together.

Polychronopoulos & Kuck, "Guided self-scheduling" (IEEE Trans. Computers, 1987). Units shrink as
the work runs out. The share is weighted by speed: a worker that takes half the time per row gets
twice the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

#: Size of the next unit, as a fraction of a worker's equal share of the remaining rows.
SHARE = 0.5
#: The first call has at least this many rows, however many workers there are.
_FEW_ROWS = 32


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


def cut_pieces(pieces: Iterable[int], n_wanted: int, batch_rows: int) -> list[int]:
    """Rows that a unit of about `n_wanted` rows takes of each of the next pieces.

    Whole batches, which are filled across pieces; or less than one if that is wanted. If less than
    half a batch would be left of all pieces, the unit takes that, too.

    >>> [cut_pieces([n], 70, 32) for n in (50, 79, 80, 500)]
    [[50], [79], [64], [64]]
    >>> cut_pieces([20, 20, 20], 32, 32), cut_pieces([100, 10, 10, 50], 130, 32)
    ([20, 12], [100, 10, 10, 8])
    >>> cut_pieces([60, 8, 4, 3], 64, 32)
    [60, 8, 4, 3]
    """
    least = batch_rows // 2 if n_wanted >= batch_rows else 0
    if n_wanted >= batch_rows:
        n_wanted -= n_wanted % batch_rows
    taken: list[int] = []
    n_taken, rest = 0, iter(pieces)
    for n_piece in rest:
        n_rows = min(n_piece, n_wanted - n_taken)
        taken.append(n_rows)
        n_taken += n_rows
        if n_taken == n_wanted:
            return taken[:-1] + (_little([n_piece], rest, n_piece - n_rows, least) or [n_rows])
    return taken


def _little(last: list[int], rest: Iterator[int], n_left: int, least: int) -> list[int]:
    """The `last` piece and all after it, if fewer than `least` rows are left of them; else none."""
    while n_left < least:
        n_piece = next(rest, None)
        if n_piece is None:
            return last
        last, n_left = [*last, n_piece], n_left + n_piece
    return []
