"""The real policy in a simulated world."""

from __future__ import annotations

import pytest

from dask_pcm.scheduling.policy import decide
from dask_pcm.simulation import simulate
from dask_pcm.simulation.policies import gate
from tests.support.scenarios import pool, run, world


@pytest.fixture
def validated(monkeypatch):
    """The gate's picture is looked over after each decision."""
    n_decisions = 0

    def decide_and_validate(state, *args):
        nonlocal n_decisions
        n_decisions += 1
        actions = decide(state, *args)
        state.validate()
        return actions

    monkeypatch.setattr(gate, "decide", decide_and_validate)
    yield
    assert n_decisions > 10


@pytest.mark.parametrize("seed", range(3))
def test_its_picture_holds_whatever_comes_and_goes(tmp_path, validated, seed):
    pools = {
        "taken": pool(n_workers=4, life_s=20, rejoins_after_s=3),
        "told": pool(n_workers=4, walltime_s=25, notice_s=4, rejoins_after_s=1),
        "broken": pool(broken={"n_workers": 1, "fails_after_s": 2}),
    }
    runs = {
        "one": {"rows": 60, "contexts": ["a"]},
        "two": {"rows": 60, "contexts": ["a", "b"], "starts_s": 20},
        "tasks": {"rows": 40, "task_rows": 2, "contexts": ["b"], "is_run": False, "priority": 1},
    }
    contexts = {
        name: {"load_s": 2, "row_s": 1, "device_bytes": 4, "files": [{"bytes": 5}]} for name in "ab"
    }
    scenario = world(tmp_path, pools, runs, devices={"gpu": 10}, contexts=contexts)
    result = simulate(scenario, seed=seed)
    assert result.record.n_rows == 160
    assert result.bound_s <= result.makespan_s < 1_000


def test_work_that_fits_nowhere_fails_and_the_run_ends(tmp_path, validated):
    context = {"device_bytes": 12}
    devices = {"gpu": 10, "slow": 10}
    scenario = world(tmp_path, runs=run(40, task_rows=1), context=context, devices=devices)
    result = simulate(scenario)
    assert result.record.rows_failed == 40
    assert result.record.n_rows == 0
