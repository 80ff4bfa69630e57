"""When a worker lends."""

from __future__ import annotations

import pytest

from dask_pcm.ladder.lending.informer import Informer


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([(0, 0), (5, 1), (9, 2)], [True, True, True]),
        ([(10, 0), (9, 1), (3, 2), (3, 60)], [False, False, False, False]),
        ([(50, 0), (2, 1), (0, 2.9), (1, 3)], [False, False, False, True]),
        # Not quiet for long enough: it begins anew.
        ([(50, 0), (2, 1), (3, 2), (2, 3), (2, 4.9), (2, 5)], [False] * 5 + [True]),
    ],
)
def test_it_offers_when_it_is_quiet_and_withdraws_before_its_requests_wait(seen, expected):
    informer = Informer()
    assert [informer.decide(n_waiting, now) for n_waiting, now in seen] == expected
