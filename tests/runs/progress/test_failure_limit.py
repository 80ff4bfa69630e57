from __future__ import annotations

import numpy as np
import pytest

from dask_pcm.errors import LimitError
from dask_pcm.runs.progress.failure_limit import FailureLimit


@pytest.mark.parametrize(
    ("limit", "of_1000"),
    [
        ({"rows": 7}, 7),
        ({"rows": np.int64(7)}, 7),
        ({"rows": 0}, 0),
        ({"share": 0.01}, 10),
        ({"share": 0}, 0),
        ({"rows": 20, "share": 0.01}, 10),
        ({"rows": 7, "share": 0.01}, 7),
    ],
)
def test_numbers_and_shares(limit, of_1000):
    limit = FailureLimit(**limit)
    assert limit.allows(of_1000, 1000) and not limit.allows(of_1000 + 1, 1000)


def test_a_share_is_checked_from_1000_rows_on_or_at_the_end():
    limit = FailureLimit(share=0.01)
    assert limit.allows(999, 999)
    assert not limit.allows(11, 1_000) and limit.allows(11, 1_100)
    assert not limit.allows(2, 100, is_all=True) and limit.allows(1, 100, is_all=True)


def test_without_one_any_number_may_fail():
    assert FailureLimit().allows(10**9, 10**9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rows": 0.05}, r"found 0\.05\. For a share of the rows, use max_failed_share="),
        ({"rows": "5%"}, r"found '5%'\. For a share of the rows, use max_failed_share="),
        ({"rows": -1}, r"max_failed_rows takes a number of rows, such as 20; found -1\.$"),
        ({"rows": True}, "found True"),
        ({"rows": [1]}, r"found \[1\]"),
        ({"share": 20}, r"from 0 to 1, such as 0\.01; found 20\. For a number of rows, use"),
        ({"share": "1%"}, r"found '1%'\.$"),
        ({"share": float("nan")}, "found nan"),
        ({"share": True}, "found True"),
    ],
)
def test_anything_else_is_refused(given, says):
    with pytest.raises(LimitError, match=says):
        FailureLimit(**given)


def test_who_says_that_all_may_fail():
    assert FailureLimit(share=1.0).allows_all(10) and FailureLimit(rows=10).allows_all(10)
    assert not FailureLimit().allows_all(10)
    assert not FailureLimit(share=0.99).allows_all(10) and not FailureLimit(rows=9).allows_all(10)
