from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_pcm.scheduling.feed.sizes import cut_pieces, unit_rows


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


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=20),
    st.integers(1, 500),
    st.integers(1, 64),
)
def test_pieces_are_taken_in_order_and_only_the_last_in_part(pieces, n_wanted, batch_rows):
    taken = cut_pieces(pieces, n_wanted, batch_rows)
    assert 1 <= len(taken) <= len(pieces) and min(taken) >= 1
    assert taken[:-1] == pieces[: len(taken) - 1]
    assert taken[-1] <= pieces[len(taken) - 1]
    assert sum(taken) < n_wanted + max(1, batch_rows // 2)


def test_pieces_are_looked_at_only_as_far_as_they_are_taken():
    seen = []
    assert cut_pieces((seen.append(n) or n for n in [50, 60, 70]), 64, 64) == [50, 14]
    assert seen == [50, 60]
