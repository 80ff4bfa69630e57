from __future__ import annotations

import math

import pytest

from dask_pcm.simulation.policies.bound import bound_s, lives_until, possible_rows
from tests.support.scenarios import pool, run, world


def bound(scenario):
    return bound_s(scenario, list(lives_until(scenario, 0, math.inf)))


def test_water_is_poured_over_steps(tmp_path):
    """One worker from 5 s on, a second from 9 s on: 4 rows by 9 s, then two a second."""
    pools = {"first": pool(), "second": pool(joins_s=4)}
    assert bound(world(tmp_path, pools, run(10))) == pytest.approx(12)


def test_what_ends_does_no_more(tmp_path):
    pools = {"short": pool(walltime_s=8), "other": pool(joins_s=20)}
    assert bound(world(tmp_path, pools, run(10))) == pytest.approx(25 + 7)


def test_without_workers_the_bound_is_infinite(tmp_path):
    assert bound(world(tmp_path, {"short": pool(walltime_s=8)})) == math.inf


def test_broken_workers_do_not_count(tmp_path):
    pools = {"nodes": pool(n_workers=2, broken={"n_workers": 1})}
    assert bound(world(tmp_path, pools)) == pytest.approx(15)


def test_a_run_starts_when_it_does(tmp_path):
    assert bound(world(tmp_path, runs=run(10, starts_s=30))) == pytest.approx(40)


def test_runs_of_two_contexts_share_the_workers(tmp_path):
    contexts = {name: {"load_s": 5, "row_s": 1} for name in "ab"}
    runs = {name: {"rows": 10, "contexts": [name]} for name in contexts}
    assert bound(world(tmp_path, runs=runs, contexts=contexts)) == pytest.approx(25)


def test_what_was_possible(tmp_path):
    scenario = world(tmp_path, {"a": pool(), "short": pool(walltime_s=7)})
    lives = list(lives_until(scenario, 0, 100))
    assert possible_rows(scenario, lives, 10) == pytest.approx(5 + 2)
