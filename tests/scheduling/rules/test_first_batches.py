from __future__ import annotations

from itertools import permutations

import pytest

from dask_pcm.scheduling.rules.first_batches import Failing, FirstBatches

V, K = "ValueError", "KeyError"


def first_of(parts):
    first = FirstBatches()
    for number, failing in parts:
        first.note(number, Failing(*failing))
    return first


def test_three_batches_of_one_type_in_whatever_order_they_become_known():
    parts = [(0, (1, V)), (1, (1, V)), (2, (1, V))]
    for order in permutations(parts):
        first = FirstBatches()
        for at, (number, failing) in enumerate(order):
            assert not first.is_hopeless(), at
            first.note(number, Failing(*failing))
        assert first.is_hopeless()


@pytest.mark.parametrize(
    ("parts", "n_parts", "is_hopeless"),
    [
        ([(0, (3, V))], None, True),
        ([(0, (2, V))], None, False),
        ([(0, (2, V))], 1, True),  # all that there is
        ([(0, (2, V))], 2, False),
        ([(1, (40, V)), (2, (40, V))], None, False),  # late, and so a matter of these rows
        ([(0, (1, V)), (1, (1, K)), (2, (1, V))], None, False),
        ([(0, (0, "")), (1, (0, "")), (2, (3, V))], None, True),  # parts without rows
        ([(0, (0, "")), (1, (0, ""))], 2, False),
        ([(0, (2, V)), (1, (0, ""))], 2, True),
        ([], 0, False),
    ],
)
def test_what_is_hopeless(parts, n_parts, is_hopeless):
    assert first_of(parts).is_hopeless(n_parts) is is_hopeless
