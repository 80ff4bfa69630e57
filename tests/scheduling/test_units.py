from __future__ import annotations

from collections import Counter

import pytest

from dask_pcm.scheduling.units import DeviceDemand, Outstanding, UnitSizing, unit_rows


def sizes(n_rows, n_workers, batch_rows, row_s, unit_s=1.0, max_rows=10**9):
    taken = []
    while n_rows:
        taken.append(unit_rows(n_rows, n_workers, batch_rows, row_s, unit_s, max_rows))
        n_rows -= taken[-1]
    return taken


def test_units_shrink_to_a_batch_as_the_work_runs_out():
    found = sizes(10_000, 2, 32, row_s=1e-6)
    assert sum(found) == 10_000
    assert found == sorted(found, reverse=True)
    assert found[0] == 2_500
    assert found[-2] <= 64


def test_a_unit_is_aimed_at_its_seconds():
    assert sizes(10**6, 2, 32, row_s=0.002)[0] == 500


def test_nothing_known_means_one_batch():
    assert unit_rows(10**6, 2, 32, None, 1.0, 10**6) == 32


@pytest.mark.parametrize("n_rows", [1, 5, 31, 32, 33])
def test_never_below_a_batch_but_for_the_last(n_rows):
    assert unit_rows(n_rows, 8, 32, 0.01, 1.0, 10**6) == min(n_rows, 32)


def test_long_calls_are_made_smaller_at_the_end():
    """A call of 500 rows takes 50 s; at the end there is less than that for each of two workers."""
    found = sizes(5_000, 2, 500, row_s=0.1)
    assert set(found[:6]) == {500} and found == sorted(found, reverse=True)
    assert found[-1] <= 10 and sum(found) == 5_000


def test_makespan_over_the_bound_with_speeds_one_to_three():
    """Two workers take units as they become free; the simulation of the design's figure."""
    free = {0: 0.0, 1: 0.0}
    row_s, left, over_s = {0: 0.04 / 32, 1: 0.12 / 32}, 700 * 32, 0.01
    while left:
        worker = min(free, key=free.__getitem__)
        n_rows = unit_rows(left, 2, 32, row_s[worker], 1.0, 10**9)
        free[worker] += over_s + n_rows * row_s[worker]
        left -= n_rows
    bound = 700 * 32 / sum(1 / s for s in row_s.values())
    assert max(free.values()) / bound < 1.05


def stock(batch_rows=1, unit_s=1.0, max_rows=10**6, n_lanes=2, ready_s=0.5):
    return Outstanding(UnitSizing(batch_rows, unit_s, max_rows, n_lanes, ready_s))


def fed(stocked, n_uncut, *demand):
    """Sizes that are handed over until there are enough."""
    sizes = []
    while (size := stocked.next(n_uncut, demand, len(sizes))) is not None:
        stocked.add(size.device, size.n_rows)
        sizes.append(size)
        n_uncut -= size.n_rows
    return sizes


def test_units_are_as_large_as_the_asker_is_fast():
    fast, slow = DeviceDemand("H100", 2, 0.001), DeviceDemand("T4", 2, 0.01)
    sizes = fed(stock(), 10**6, fast, slow)
    assert {size.n_rows for size in sizes if size.device == "H100"} == {1000}
    assert {size.n_rows for size in sizes if size.device == "T4"} == {100}
    assert Counter(size.device for size in sizes) == {"H100": 6, "T4": 6}


def test_the_share_of_what_remains_is_the_askers():
    fast, slow = DeviceDemand("H100", 1, 0.001), DeviceDemand("T4", 1, 0.003)
    first, *_ = fed(stock(unit_s=1e6), 4000, fast, slow)
    assert (first.device, first.n_rows) == ("H100", 1500)  # half of three quarters
    (alone,) = fed(stock(unit_s=1e6, n_lanes=0, ready_s=0.1), 4000, slow._replace(n_workers=1))[:1]
    assert (alone.device, alone.n_rows) == ("", 2000)


def test_what_was_cut_for_devices_that_are_gone_is_at_hand_for_the_others():
    stocked = stock(ready_s=0.0)
    for _ in range(6):
        stocked.add("gone", 10)
    assert fed(stocked, 10**6, DeviceDemand("T4", 2, 0.01)) == []
    stocked.remove("gone", 10)
    assert len(fed(stocked, 10**6, DeviceDemand("T4", 2, 0.01))) == 1


def test_short_units_are_kept_by_the_second():
    sizes = fed(stock(max_rows=1), 10**6, DeviceDemand("", 1, 0.01))
    assert len(sizes) == 50


def test_no_more_than_a_hundred_units_at_a_time():
    assert len(fed(stock(max_rows=1, ready_s=100.0), 10**6, DeviceDemand("", 1, 0.01))) == 100
