"""How many rows a record has."""

from __future__ import annotations

from dask_pcm.ledger.suspects import Cost, Suspects
from dask_pcm.runs.units.pace import Pace


def sizes(pace, row_s, n=12):
    """Rows of the first batches, where each is done before the next begins."""
    found, start = [], 0
    for _ in range(n):
        stop = pace.end(start)
        found.append(stop - start)
        pace.observe(start, (stop - start) * row_s)
        start = stop
    return found


def test_records_of_quick_batches_grow_until_they_take_a_little_time():
    assert sizes(Pace(32, Suspects()), row_s=0.01) == [32] * 12
    quick = sizes(Pace(32, Suspects()), row_s=1e-5)
    assert quick == sorted(quick) and 0.02 <= quick[-1] * 1e-5 < 0.04


def test_suspects_come_in_batches_of_their_own():
    pace = Pace(32, Suspects([Cost(320, 352, 2)]))
    sizes(pace, row_s=1e-5, n=3)
    assert pace.end(300) == 320 and pace.end(320) == 336 and pace.end(352) > 352 + 32
