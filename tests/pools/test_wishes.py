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
    assert wishes.targets == {"a": 3, "b": 4} and asked == [30.0]  # jobs of b have two each
    follow(wishes, lambda _: 0)
    assert wishes.targets == {"a": 0, "b": 2}
    wishes.adapt(0, 4, 60)
    follow(wishes, lambda _: 100)
    assert wishes.targets == {"a": 3, "b": 0}  # five would be too many
    wishes.scale({"a": 1})
    follow(wishes, lambda _: 100)
    assert wishes.targets["a"] == 1


def test_what_a_pool_does_not_give_is_wanted_of_the_next(wishes):
    wishes.adapt(0, 3, 60)
    follow(wishes, lambda _: 100)
    assert wishes.targets == {"a": 3, "b": 0}
    follow(wishes, lambda _: 100, a=Offer(3, n_counted=1))
    assert wishes.targets == {"a": 3, "b": 2}


def test_minima_are_part_of_the_maximum_of_all(wishes):
    wishes.adapt({"b": 2}, 4, 60)
    follow(wishes, lambda _: 100)
    assert wishes.targets == {"a": 2, "b": 2}
    follow(wishes, lambda _: 0)
    assert wishes.targets == {"a": 0, "b": 2}
    wishes.adapt({"a": 1}, 2, 60)  # whole jobs, none of which fits beside
    follow(wishes, lambda _: 100)
    assert wishes.targets == {"a": 2, "b": 0}


def test_once_the_maximum_is_there_nothing_else_may_come(wishes):
    wishes.adapt(0, 3, 60)
    follow(wishes, lambda _: 9, a=Offer(3, n_here=1, n_asked=3, n_counted=1))
    assert wishes.targets == {"a": 3, "b": 2} and set(wishes.most.values()) == {math.inf}
    b = Offer(math.inf, n_here=2, n_asked=2)
    follow(wishes, lambda _: 9, a=Offer(3, n_here=1, n_asked=3, n_counted=1), b=b)
    assert wishes.targets == wishes.most == {"a": 1, "b": 2}
    # Two have come at the same moment.
    follow(wishes, lambda _: 9, a=Offer(3, n_here=2, n_asked=2), b=b)
    assert wishes.targets == wishes.most and sum(wishes.most.values()) <= 3
    wishes.scale({"a": 3})
    assert set(wishes.most.values()) == {math.inf}


@pytest.mark.parametrize(
    ("minimum", "maximum", "words"),
    [
        ({"a": 4}, None, "'a' cannot have 4 workers at least and 3 at most"),
        ({"a": 2}, {"a": 1}, "'a' cannot have 2 workers at least and 1 at most"),
        ({"b": 3}, {"b": 3}, "'b' cannot have 3 workers at least .* its jobs have 2 each"),
        (
            {"a": 2, "b": 2},
            3,
            "the pools cannot have 4 workers at least, in whole jobs, and 3 at most",
        ),
        ({"a": 1, "b": 1}, 2, "the pools cannot have 3 workers at least, in whole jobs"),
        (0, {"b": 1}, "'b' cannot have 1 workers at most; its jobs have 2 each"),
        (0, {"a": 0, "b": math.nan}, "pool 'b' cannot have nan"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(wishes, minimum, maximum, words):
    with pytest.raises(PoolError, match=words):
        wishes.adapt(minimum, maximum, 60)
    assert not wishes.is_adaptive


@pytest.mark.parametrize("n", [-1, 1.5, "2", True, math.nan, math.inf, None])
def test_what_is_no_number_of_workers_is_refused(wishes, n):
    with pytest.raises(PoolError, match="pool 'a' cannot have"):
        wishes.scale({"a": n})
    assert wishes.targets == {"a": 0, "b": 0}


def test_more_than_a_pool_may_have_is_refused(wishes):
    with pytest.raises(PoolError, match="'a' cannot have 4 workers; its max_jobs allows 3"):
        wishes.scale({"a": 4})


def test_a_number_alone_names_no_pool(wishes):
    with pytest.raises(PoolError, match="scale: a pool cannot have 'x' workers"):
        wishes.scale("x")
    with pytest.raises(PoolError, match=r"scale\(3\) does not say of which pool. Give \{'a': n"):
        wishes.scale(3)
    with pytest.raises(PoolError, match="all pools cannot have -1"):
        wishes.adapt(0, -1, 60)
    with pytest.raises(PoolError, match="cannot have endless workers as minimum"):
        wishes.adapt({"a": math.inf}, None, 60)
    with pytest.raises(PoolError, match="target_duration is 'x'; expected a time"):
        wishes.adapt(0, None, "x")
