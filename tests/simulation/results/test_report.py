"""Reports of simulations, and the command."""

from __future__ import annotations

import csv
import importlib.util

import pytest
from click.testing import CliRunner

from dask_pcm.cli import main

SMALL = """\
title: Two of a kind
store_bandwidth: 1 GB/s
devices: {gpu: null}
contexts:
  llm: {load_s: 1, row_s: 0.1}
pools:
  gpus: {device: gpu, n_workers: 2, link: 100 MB/s}
runs:
  verify: {rows: 400, contexts: [llm]}
"""


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def command(*args):
    return CliRunner().invoke(main, ["simulate", *map(str, args)])


def test_a_table_with_a_line_for_each_policy(scenario):
    done = command(scenario, "--policy", "all")
    assert done.exit_code == 0, done.output
    assert "Two of a kind" in done.output
    lines = [line.split() for line in done.output.splitlines()]
    told = {line[0]: line[1:] for line in lines if line and line[0] in ("ours", "naive")}
    assert told["ours"][:4] == ["21", "19", "21", "1.003"]
    assert told["naive"][4] == "4"  # loads


def test_ours_alone_unless_asked(scenario):
    done = command(scenario)
    assert "ours" in done.output and "pervasive" not in done.output


def test_a_sweep_has_a_line_for_each_size(scenario):
    scenario.write_text(SMALL + "sweep_task_rows: [1, 100]\n")
    done = command(scenario, "--policy", "partial")
    assert "1 rows a task" in done.output and "100 rows a task" in done.output


def test_a_report(scenario, tmp_path):
    folder = tmp_path / "new" / "report"
    done = command(scenario, "--policy", "all", "--report", folder)
    assert done.exit_code == 0, done.output
    summary = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["policy"] for row in summary] == ["ours", "pervasive", "partial", "naive"]
    assert {row["rows_done"] for row in summary} == {"400.0"}
    progress = list(csv.DictReader((folder / "progress.csv").open()))
    last = [row for row in progress if row["policy"] == "ours"][-1]
    assert (last["rows"], last["joined"], last["warm"]) == ("400.0", "2", "2")
    spans = list(csv.DictReader((folder / "spans.csv").open()))
    assert {row["what"] for row in spans} == {"stage", "load", "work"}
    page = (folder / "report.html").read_text()
    assert "Two of a kind" in page and "bokeh" in page
    assert "<script src=" not in page and "<link " not in page


def test_the_same_again_writes_the_same(scenario, tmp_path):
    for name in "ab":
        command(scenario, "--seed", 5, "--report", tmp_path / name)
    for file in ("summary.csv", "progress.csv", "spans.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_without_bokeh_the_extra_is_named(scenario, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = command(scenario, "--report", tmp_path / "report")
    assert done.exit_code == 1
    assert "pip install 'dask-pcm[monitoring]'" in done.output
    assert not (tmp_path / "report").exists()


def test_mistakes_are_told_without_a_traceback(scenario):
    scenario.write_text(SMALL.replace("row_s: 0.1", "row_s: -1"))
    done = command(scenario)
    assert done.exit_code == 1
    assert "small.yaml, line 5: row_s: must be above 0; found -1." in done.output
    assert "Traceback" not in done.output
