from __future__ import annotations

import pytest

from dask_pcm.errors import LimitError
from dask_pcm.ledger.limit import Limit


@pytest.mark.parametrize(
    ("given", "of_1000"),
    [("1%", 10), ("0.05", 50), (0.05, 50), ("7", 7), (7, 7), ("0", 0), (0, 0), ("100%", 1000)],
)
def test_numbers_and_shares(given, of_1000):
    limit = Limit.of(given)
    assert limit.allows(of_1000, 1000) and (of_1000 == 1000 or not limit.allows(of_1000 + 1, 1000))


def test_without_one_any_number_may_fail():
    assert Limit.of(None).allows(10**9, 10**9)
    assert not Limit.of(None).is_hopeless(10**6, 10**6)


@pytest.mark.parametrize("given", ["120%", "-1", -1, 1.5, True, "many", [1]])
def test_anything_else_is_refused(given):
    with pytest.raises(LimitError, match="a number of rows or a share of them"):
        Limit.of(given)


def test_nothing_but_failures_is_hopeless_unless_all_may_fail():
    assert Limit.of("50%").is_hopeless(1_000, 1_000)
    assert not Limit.of("50%").is_hopeless(999, 999)
    assert not Limit.of("50%").is_hopeless(1_000, 1_001)
    assert not Limit.of("100%").is_hopeless(1_000, 1_000)
