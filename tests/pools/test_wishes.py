"""How many workers of each pool are wanted, after scale and adapt."""

from __future__ import annotations

import math

import pytest

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.pools.wishes import Wishes
from dask_pcm.scheduling.rules.scaling import Offer

POOLS = {"a": pcm.Pool(batch="local", max_jobs=3), "b": pcm.Pool(batch="local", gpus_per_job=2)}


def follow(wishes, wanted, **offers):
    known = {name: Offer(pool.max_workers) for name, pool in POOLS.items()}
    wishes.follow(wanted, None, {**known, **offers}, 0.0)


@pytest.fixture
def wishes():
    return Wishes(POOLS)


def test_scale_changes_the_pools_that_it_names(wishes):
    wishes.scale({"a": 2})
    wishes.scale({"b": 4})
    assert wishes.targets == {"a": 2, "b": 4} and not wishes.is_adaptive
    wishes.scale(0)
    assert wishes.targets == {"a": 0, "b": 0}


def test_adapt_stays_within_limits_of_user_and_pools(wishes):
    wishes.adapt({"b": 1}, {"b": 5}, "30s")
    asked = []

    def wanted(seconds):
        asked.append(seconds)
        return 100

    follow(wishes, wanted)
    assert wishes.targets == {"a": 3, "b": 5} and asked == [30.0]
    follow(wishes, lambda _: 0)
    assert wishes.targets == {"a": 0, "b": 1}
    wishes.adapt(0, 4, 60)
    follow(wishes, lambda _: 100)
    assert sum(wishes.targets.values()) == 4
    wishes.scale({"a": 1})
    follow(wishes, lambda _: 100)
    assert wishes.targets["a"] == 1


def test_what_a_pool_does_not_give_is_wanted_of_the_next(wishes):
    wishes.adapt(0, 3, 60)
    follow(wishes, lambda _: 100)
    assert wishes.targets == {"a": 3, "b": 0}
    follow(wishes, lambda _: 100, a=Offer(3, n_counted=1))
    assert wishes.targets == {"a": 3, "b": 2}


@pytest.mark.parametrize("n", [-1, 1.5, "2", True, math.nan, math.inf, None])
def test_what_is_no_number_of_workers_is_refused(wishes, n):
    with pytest.raises(PoolError, match="pool 'a' cannot have"):
        wishes.scale({"a": n})
    assert wishes.targets == {"a": 0, "b": 0}


def test_a_number_alone_names_no_pool(wishes):
    with pytest.raises(PoolError, match=r"scale\(3\) does not say of which pool. Give \{'a': n"):
        wishes.scale(3)
    with pytest.raises(PoolError, match="all pools cannot have -1"):
        wishes.adapt(0, -1, 60)
    with pytest.raises(PoolError, match="cannot have endless workers as minimum"):
        wishes.adapt({"a": math.inf}, None, 60)
    with pytest.raises(PoolError, match="target_duration is 'x'; expected a time"):
        wishes.adapt(0, None, "x")
