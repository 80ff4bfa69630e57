from __future__ import annotations

import pytest

from dask_pcm.errors import LimitError
from dask_pcm.runs.progress.failure_limit import FailureLimit


@pytest.mark.parametrize(
    ("given", "of_1000"),
    [("1%", 10), ("0.05", 50), (0.05, 50), ("7", 7), (7, 7), ("0", 0), (0, 0), ("100%", 1000)],
)
def test_numbers_and_shares(given, of_1000):
    limit = FailureLimit.of(given)
    assert limit.allows(of_1000, 1000) and (of_1000 == 1000 or not limit.allows(of_1000 + 1, 1000))


def test_a_share_is_looked_at_from_1000_rows_on_or_at_the_end():
    limit = FailureLimit.of("1%")
    assert limit.allows(999, 999)
    assert not limit.allows(11, 1_000) and limit.allows(11, 1_100)
    assert not limit.allows(2, 100, is_all=True) and limit.allows(1, 100, is_all=True)
    assert not FailureLimit.of(1).allows(2, 100)  # a number is a number


def test_without_one_any_number_may_fail():
    assert FailureLimit.of(None).allows(10**9, 10**9)


@pytest.mark.parametrize("given", ["120%", "-1", -1, 1.5, True, "many", [1]])
def test_anything_else_is_refused(given):
    with pytest.raises(LimitError, match="a number of rows or a share of them"):
        FailureLimit.of(given)


def test_who_says_that_all_may_fail():
    assert FailureLimit.of("100%").allows_all(10) and FailureLimit.of(10).allows_all(10)
    assert not FailureLimit.of(None).allows_all(10)
    assert not FailureLimit.of("99%").allows_all(10) and not FailureLimit.of(9).allows_all(10)
