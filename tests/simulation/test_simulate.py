"""Whole simulations, with times computed by hand."""

from __future__ import annotations

import math

import pytest

from dask_pcm.simulation import POLICIES, figures, read_scenario, simulate, variants
from tests.support.scenarios import EXACT, FREE, pool, run, world

FILES = {"files": [{"bytes": 100}]}


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        ("naive", 2 * (10 + 5 + 5)),  # everything for each of two tasks
        ("partial", 10 + 2 * (5 + 5)),  # the file once
        ("pervasive", 10 + 5 + 10),  # the load once
        ("ours", 13 + 5 + 10),  # a swarm's overhead on the file
    ],
)
def test_one_worker(tmp_path, policy, seconds):
    result = simulate(world(tmp_path, runs=run(10, task_rows=5), context=FILES), policy)
    assert result.makespan_s == pytest.approx(seconds)
    assert result.bound_s == pytest.approx(10 + 5 + 10)
    assert result.record.n_rows == 10
    assert result.record.n_loads == (1 if policy in ("ours", "pervasive") else 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_files_are_unpacked_while_others_arrive(tmp_path, policy):
    files = {"files": [{"bytes": 100, "unpack_s": 8}, {"bytes": 50}]}
    result = simulate(world(tmp_path, context=files), policy)
    assert result.bound_s == pytest.approx(10 + 8 + 5 + 10)
    arrived = {"ours": 13 + 8, "pervasive": 10 + 8}.get(policy, 15 + 0.0)
    # From the store both files come at once: at 10 s of each 50 bytes, the rest of the first at 15.
    expected = (15 + 8 if policy in ("naive", "partial") else arrived) + 5 + 10
    assert result.makespan_s == pytest.approx(expected)


def test_two_speeds_end_together(tmp_path):
    pools = {"fast": pool(), "slow": pool(device="slow")}
    result = simulate(world(tmp_path, pools, run(300, task_rows=30), {"load_s": 0}))
    assert result.bound_s == pytest.approx(200)
    assert result.makespan_s <= 202
    fixed = simulate(world(tmp_path, pools, run(300, task_rows=100), {"load_s": 0}), "pervasive")
    assert fixed.makespan_s == pytest.approx(200)  # two tasks of 100 s beside one of 200 s


def test_a_broken_worker_gets_fewer_and_fewer_loads_from_us_and_many_from_pervasive(tmp_path):
    broken = {"n_workers": 1, "fails_after_s": 2}
    pools = {"nodes": pool(n_workers=2, broken=broken)}
    scenario = world(
        tmp_path, pools, run(40, task_rows=10), baselines={**EXACT, "retry_s": 3, "n_retries": 4}
    )
    ours, theirs = simulate(scenario), simulate(scenario, "pervasive")
    assert [ours.makespan_s, theirs.makespan_s] == pytest.approx([45, 45])
    assert ours.record.n_failed_loads == 3  # at first, 10 s and 20 s later
    assert theirs.record.n_failed_loads == 4
    assert theirs.record.wasted_s == pytest.approx(4 * 2)
    assert ours.bound_s == pytest.approx(45)


def test_no_finish_is_reported_as_never(tmp_path):
    silent = {"nodes": pool(broken={"n_workers": 1})}
    for policy in POLICIES:
        result = simulate(world(tmp_path, silent), policy)
        assert math.isinf(result.makespan_s)
        assert result.record.n_rows == 0


@pytest.mark.parametrize(
    ("policy", "is_journalled", "seconds", "n_redone"),
    [
        ("ours", True, 8 + 5 + 8, 1),  # two rows are in the journal, the third was begun
        ("ours", False, 8 + 5 + 10, 3),
        ("pervasive", True, 8 + 5 + 10, 3),
    ],
)
def test_a_loss(tmp_path, policy, is_journalled, seconds, n_redone):
    pools = {"short": pool(walltime_s=7.5), "later": pool(joins_s=8)}
    scenario = world(
        tmp_path,
        pools,
        run(10, task_rows=10, is_run=False),
        overheads={**FREE, "is_journalled": is_journalled},
    )
    result = simulate(scenario, policy)
    assert result.makespan_s == pytest.approx(seconds)
    assert result.record.rows_redone == n_redone
    assert result.record.lost_s == pytest.approx(n_redone - 0.5)


def test_a_loss_while_loading_is_wasted(tmp_path):
    pools = {"short": pool(walltime_s=3), "later": pool(joins_s=4)}
    for policy in ("ours", "pervasive"):
        result = simulate(world(tmp_path, pools), policy)
        assert result.makespan_s == pytest.approx(4 + 5 + 10)
        assert result.record.wasted_s == pytest.approx(3)
        assert (result.record.n_joined, result.record.n_lost) == (2, 1)


def test_what_is_told_of_its_end_takes_nothing_more(tmp_path):
    """Told at 7.3 s, it still does the rows on its two lanes, until 9 s; nothing of it is lost."""
    pools = {"short": pool(walltime_s=9.5, notice_s=2.2), "later": pool(joins_s=10)}
    scenario = world(tmp_path, pools, run(10, task_rows=1, is_run=False))
    result = simulate(scenario)
    assert result.record.rows_redone == 0
    assert result.makespan_s == pytest.approx(10 + 5 + 6)


def test_plain_tasks_go_by_priority(tmp_path):
    """The last five seconds are the others', which take as long."""
    tasks = {"rows": 5, "task_rows": 1, "is_run": False}
    runs = {
        "later": {**tasks, "contexts": ["slow"]},
        "first": {**tasks, "contexts": ["fast"], "priority": 1},
    }
    contexts = {"fast": {"load_s": 5, "row_s": 1}, "slow": {"load_s": 5, "row_s": 2}}
    result = simulate(world(tmp_path, runs=runs, contexts=contexts))
    assert result.record.n_rows == 10
    at_s = list(result.record.done_at_s)
    assert at_s[:5] == pytest.approx([6, 7, 8, 9, 10])


def test_contexts_take_turns_where_one_fits(tmp_path):
    contexts = {name: {"load_s": 5, "row_s": 1, "device_bytes": 6, "restore_s": 1} for name in "ab"}
    runs = {name: {"rows": 30, "contexts": [name]} for name in contexts}
    scenario = world(tmp_path, runs=runs, devices={"gpu": 10}, contexts=contexts)
    result = simulate(scenario)
    assert result.record.n_rows == 60
    assert result.bound_s <= result.makespan_s < 100


def test_the_same_seed_is_the_same_simulation():
    scenario = read_scenario("drain")
    first, again = (figures(simulate(scenario, "pervasive", seed=3)) for _ in range(2))
    assert first == again
    assert figures(simulate(scenario, "pervasive", seed=4)) != first


def test_every_policy_sees_the_same_workers():
    scenario = read_scenario("drain")
    lives = [simulate(scenario, policy, seed=1).record for policy in ("pervasive", "naive")]
    shared = lives[0].left_s.keys() & lives[1].left_s.keys()
    assert len(shared) > 20
    for name in shared:
        assert lives[0].joined_s[name] == lives[1].joined_s[name]
        assert lives[0].left_s[name] == lives[1].left_s[name]


def test_a_sweep_is_a_scenario_for_each_size():
    sizes = [
        scenario.runs[0].task_rows for _, scenario in variants(read_scenario("batch-size-sweep"))
    ]
    assert sizes == [1, 10, 100, 1_000, 3_000, 7_500]
    assert [name for name, _ in variants(read_scenario("drain"))] == [""]


# -- what was calibrated stays so ----------------------------------------------------------------


def test_pervasive_is_as_in_the_log():
    found = []
    for seed in range(6):
        result = simulate(read_scenario("scale-out-186"), "pervasive", seed)
        record = result.record
        first = {worker: at for worker, at in record.first_work_s.items() if at < 302}
        waits = sorted(at - record.joined_s[worker] for worker, at in first.items())
        p10, p50, p90 = (waits[int(share * len(waits))] for share in (0.1, 0.5, 0.9))
        found.append((len(waits), p10, p50, p90, result.makespan_s))
    means = [sum(values) / len(values) for values in zip(*found, strict=True)]
    assert means == pytest.approx([66, 77, 99, 130, 13.1 * 60], rel=0.15)


def test_twenty_gpus_are_as_in_the_paper():
    scenario = read_scenario("twenty-gpus")
    assert simulate(scenario, "naive").makespan_s == pytest.approx(3 * 3600, rel=0.15)
    assert simulate(scenario, "pervasive").makespan_s == pytest.approx(48 * 60, rel=0.15)


def test_one_gpu_is_as_in_the_paper():
    result = simulate(read_scenario("one-gpu"), "pervasive")
    assert result.makespan_s == pytest.approx(11.4 * 3600, rel=0.15)


def test_the_papers_scenarios_share_their_parameters():
    names = ("one-gpu", "twenty-gpus", "batch-size-sweep", "scale-out-186")
    scenarios = [read_scenario(name) for name in names]
    assert len({scenario.baselines for scenario in scenarios}) == 1
    assert len({scenario.store_bytes_s for scenario in scenarios}) == 1
