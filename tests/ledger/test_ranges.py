"""Sets of rows."""

from __future__ import annotations

import pytest

from dask_pcm.ledger.ranges import Ranges


@pytest.mark.parametrize(
    ("ranges", "missing"),
    [([], [(0, 9)]), ([(0, 9)], []), ([(2, 3), (3, 5)], [(0, 2), (5, 9)]), ([(20, 30)], [(0, 9)])],
)
def test_ranges(ranges, missing):
    assert list(Ranges(ranges).missing(0, 9)) == missing
