"""Scenario files, good and bad."""

from __future__ import annotations

import pytest

from dask_pcm.errors import PCMError, ScenarioError
from dask_pcm.simulation import read_any, read_scenario, shipped
from dask_pcm.simulation.serving import Serving

GOOD = """\
title: A small one
store_bandwidth: 1 GB/s
devices:
  a10: 24 GB
  cpu: null
contexts:
  llm:
    files:
      - {bytes: 3.4 GB, unpack_s: 5}
    load_s: {a10: 10, cpu: 20}
    row_s: 0.1
pools:
  gpus:
    device: a10
    n_workers: 4
    link: {100 MB/s: 0.75, 10 MB/s: 0.25}
    joins_s: {from: 10, to: 20}
runs:
  verify: {rows: 1_000, contexts: [llm]}
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "scenario.yaml"
        path.write_text(text, encoding="utf-8")
        return read_scenario(str(path))

    return read


@pytest.mark.parametrize("name", shipped())
def test_what_is_shipped_can_be_read(name):
    scenario = read_any(name)
    assert scenario.name == name and scenario.title
    assert isinstance(scenario, Serving) or scenario.n_rows > 0


def test_shipped_are_those_that_are_documented():
    expected = "batch-size-sweep burst drain one-gpu scale-out-186 short-lives ten-thousand"
    expected += " twenty-gpus two-speeds"
    assert shipped() == expected.split()


def test_the_log_has_183_workers_and_15_are_broken():
    pools = read_scenario("scale-out-186").pools
    assert sum(pool.n_workers for pool in pools) == 183
    assert sum(pool.broken.n_workers for pool in pools if pool.broken) == 15
    joins = sorted(at for pool in pools for at in pool.joins_s)
    assert (joins[0], joins[91], joins[-1]) == (21.2, 118.6, 287.1)


def test_a_good_one(read):
    scenario = read(GOOD)
    (pool,) = scenario.pools
    assert scenario.title == "A small one"
    assert scenario.device_bytes == {"a10": 24_000_000_000, "cpu": None}
    assert scenario.contexts["llm"].load_s == {"a10": 10, "cpu": 20}
    assert scenario.contexts["llm"].row_s == {"a10": 0.1, "cpu": 0.1}
    assert pool.link_bytes_s == ((1e8, 0.75), (1e7, 0.25))
    assert pool.joins_within_s == (10, 20) and pool.joins_s is None
    assert scenario.overheads.is_journalled
    assert scenario.runs[0].task_rows == 100


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("title: A small one", "tilte: A", 1, "unknown key 'tilte' of a scenario (known: title,"),
        ("store_bandwidth: 1 GB/s\n", "", 1, "a scenario has no 'store_bandwidth'"),
        ("1 GB/s", "0", 2, "store_bandwidth: a size above 0"),
        ("1 GB/s", "fast", 2, "such as 380 MB, is expected; found 'fast'"),
        ("unpack_s: 5", "unpack_s: -5", 9, "unpack_s: must be 0 or more; found -5"),
        ("{a10: 10, cpu: 20}", "{a10: 10}", 10, "nothing is said of cpu"),
        ("{a10: 10, cpu: 20}", "{a10: 10, gpu: 20}", 10, "'gpu' is no device of this file"),
        ("row_s: 0.1", "row_s: 0", 11, "row_s: must be above 0; found 0"),
        ("row_s: 0.1", "row_s: .inf", 11, "row_s: a finite number is expected; found .inf"),
        ("1 GB/s", "1e400", 2, "a size above 0"),
        ("rows: 1_000", "rows: .inf", 19, "rows: a finite number is expected; found .inf"),
        (
            "n_workers: 4",
            "n_workers: 4\n    lost_s: [1, 2]",
            14,
            "4 workers, but 2 times in lost_s",
        ),
        ("row_s: 0.1", "row_s: soon", 11, "row_s: a number is expected; found 'soon'"),
        ("    row_s: 0.1\n", "", 8, "a context has no 'row_s'"),
        ("device: a10\n", "device: h100\n", 14, "'h100' is no device of this file (there are: a10"),
        ("n_workers: 4", "n_workers: 2.5", 15, "a whole number is expected; found '2.5'"),
        ("n_workers: 4", "n_workers: 0", 15, "must be 1 or more; found 0"),
        ("0.25}", "0.5}", 16, "shares must be 1 in all; they are 1.25"),
        ("to: 20", "to: 5", 17, "joins end at 5, before they begin"),
        ("{from: 10, to: 20}", "[1, 2]", 14, "4 workers, but 2 times in joins_s"),
        ("{from: 10, to: 20}", "[1, x]", 17, "joins_s: a number is expected; found 'x'"),
        ("rows: 1_000", "rows: 1_000, rows: 2", 19, "'rows' is given twice"),
        ("[llm]", "[lm]", 19, "contexts: 'lm' is no context of this file (there are: llm)"),
        ("[llm]", "[]", 19, "a run needs a context"),
        ("verify: {rows: 1_000, contexts: [llm]}", "[]", 19, "keys and values are expected"),
        ("rows: 1_000", "rows: 1_000, is_run: maybe", 19, "true or false is expected"),
        ("title: A small one", "title: [", 1, "no YAML"),
        (GOOD, "", 1, "nothing is in it"),
        (GOOD, "[]", 1, "keys and values are expected; found a list"),
    ],
)
def test_a_bad_one_says_where_and_why(read, old, new, line, reason):
    assert old in GOOD
    with pytest.raises(ScenarioError) as caught:
        read(GOOD.replace(old, new, 1))
    message = str(caught.value)
    assert reason in message
    assert f"scenario.yaml, line {line}:" in message or "no YAML" in reason
    assert isinstance(caught.value, PCMError)


def test_all_is_said_at_once(read):
    bad = GOOD.replace("row_s: 0.1", "row_s: -1").replace("n_workers: 4", "n_wokers: 4")
    with pytest.raises(ScenarioError) as caught:
        read(bad.replace("[llm]", "[lm]"))
    lines = str(caught.value).splitlines()
    assert [line.split("line ")[1].split(":")[0] for line in lines] == ["11", "15", "19"]


def test_one_that_is_not_there():
    with pytest.raises(
        ScenarioError, match=r"'nowhere' cannot be read: .* one of: batch-size-sweep"
    ):
        read_scenario("nowhere")
