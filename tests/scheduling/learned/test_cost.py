from __future__ import annotations

import pytest

from dask_pcm.scheduling.events import ContextDeclared, ResidencyReported, WorkerJoined
from dask_pcm.scheduling.learned.cost import CostModel, Rate
from dask_pcm.tiers import Tier
from tests.support.gate_world import World

KIND, OTHER = (("llm",), "classify"), (("llm",), "embed")


def seen(cost, kind, worker, device, *rows_s, n=100):
    for row_s in rows_s:
        cost.observe_rows(kind, worker, device, row_s * n, n)


def test_the_first_call_counts_until_there_is_a_second():
    cost = CostModel()
    seen(cost, KIND, "w", "T4", 5.0)
    assert cost.row_s(KIND, "w", "T4") == pytest.approx(5.0)
    seen(cost, KIND, "w", "T4", 0.1)
    assert cost.row_s(KIND, "w", "T4") == pytest.approx(0.1)


def test_a_first_slow_call_elsewhere_says_nothing_of_the_device():
    cost = CostModel()
    seen(cost, KIND, "w", "T4", 0.1, 0.1)
    seen(cost, KIND, "new", "T4", 50.0)
    assert cost.row_s(KIND, "new", "T4") == pytest.approx(0.1)
    assert cost.row_s(KIND, "newer", "T4") == pytest.approx(0.1)


def test_it_follows_a_device_that_becomes_slower():
    cost = CostModel()
    seen(cost, KIND, "w", "T4", *[0.1] * 50, n=10)
    seen(cost, KIND, "w", "T4", *[0.4] * 20, n=10)  # 80 busy seconds
    assert cost.row_s(KIND, "w", "T4") > 0.3


def test_workers_of_one_model_may_differ():
    cost = CostModel()
    seen(cost, KIND, "fast", "T4", 0.1, 0.1)
    seen(cost, KIND, "slow", "T4", 0.3, 0.3)
    assert cost.row_s(KIND, "slow", "T4") == pytest.approx(0.3)
    assert 0.1 < cost.row_s(KIND, "unseen", "T4") < 0.3


def test_unseen_work_has_no_cost():
    cost = CostModel()
    seen(cost, OTHER, "w", "T4", 0.1, 0.1)
    assert cost.row_s(KIND, "w", "T4") is None


def test_a_new_device_model_starts_from_its_kin():
    cost = CostModel()
    seen(cost, KIND, "a", "NVIDIA A100-SXM4-40GB", 0.1, 0.1)
    seen(cost, KIND, "t", "Tesla T4", 0.9, 0.9)
    assert cost.row_s(KIND, "n", "NVIDIA A100-SXM4-80GB") == pytest.approx(0.1)


def test_a_new_kind_of_work_starts_from_how_devices_compare_in_others():
    cost = CostModel()
    seen(cost, OTHER, "a", "A100", 0.1, 0.1)
    seen(cost, OTHER, "t", "T4", 0.8, 0.8)
    seen(cost, KIND, "a", "A100", 0.02, 0.02)
    assert cost.row_s(KIND, "t", "T4") == pytest.approx(0.16)
    seen(cost, KIND, "t", "T4", 0.5, 0.5)  # seen, it is not guessed any more
    assert cost.row_s(KIND, "t", "T4") == pytest.approx(0.5)


def test_loads_are_learned_by_device_model():
    cost = CostModel()
    cost.observe_warm("llm", "A100", 4.0, is_built=True)
    cost.observe_warm("llm", "T4", 20.0, is_built=True)
    assert cost.load_s("llm", "A100") == 4.0
    assert cost.load_s("llm", "T4") == 20.0
    assert cost.restore_s("llm", "T4") == 20.0
    cost.observe_warm("llm", "T4", 1.0, is_built=False)
    assert cost.restore_s("llm", "T4") == 1.0
    assert cost.restore_s("llm", "T4 16GB") == 1.0


def test_what_was_never_loaded_is_expected_by_its_bytes():
    cost = CostModel()
    assert cost.load_s("llm", "A100", 10**9) == pytest.approx(1.0)
    assert cost.stage_s("llm", 2 * 10**8) == pytest.approx(1.0)
    assert cost.load_s("llm", "A100") == 0.0
    cost.observe_warm("other", "A100", 5.0, is_built=True, n_bytes=10**9)
    cost.observe_staged("other", 3.0, 10**9)
    assert cost.load_s("llm", "A100", 2 * 10**9) == pytest.approx(10.0)
    assert cost.stage_s("llm", 2 * 10**9) == pytest.approx(6.0)


def test_a_worker_that_is_gone_is_forgotten_and_its_device_is_not():
    cost = CostModel()
    seen(cost, KIND, "w", "T4", 0.1, 0.1)
    seen(cost, KIND, "v", "T4", 0.3, 0.3)
    cost.forget_worker("w")
    assert "w" not in cost.rows_on
    assert cost.row_s(KIND, "w", "T4") is not None


def test_a_rate_is_a_ratio_of_sums():
    rate = Rate()
    rate.observe(1.0, 1.0)
    rate.observe(0.0, 0.0)
    assert rate.value == pytest.approx(1.0)
    assert Rate().value is None


def test_files_that_are_on_a_host_need_not_come_there_again():
    world = World()
    for worker, host in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        world.tell(WorkerJoined(worker, 2, None, host, "T4"))
    world.tell(ContextDeclared("llm", "llm", None, 10**9))
    report = ResidencyReported("a1", "llm", Tier.DEVICE, seconds=9.0, is_built=True, staged_s=5.0)
    world.tell(report)
    views = world.state.workers
    assert world.state.estimates.warm_s(views["a2"], "llm") == pytest.approx(4.0)
    assert world.state.estimates.warm_s(views["b1"], "llm") == pytest.approx(9.0)
    assert world.state.estimates.cost.stage_s("other", 2 * 10**9) == pytest.approx(10.0)
