"""What a simulation of a serving device reports."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from click.testing import CliRunner
from rich.console import Console

from dask_pcm.cli import main
from dask_pcm.simulation.serving.device import POLICIES, play
from dask_pcm.simulation.serving.results import serving_table, write_serving_report
from tests.simulation.serving.test_device import SMALL


@pytest.mark.parametrize("has_burst", [True, False])
def test_a_report_has_a_line_for_each_rate_and_policy(tmp_path, has_burst):
    spec = SMALL if has_burst else replace(SMALL, burst=None)
    results = [play(spec, policy, rate) for rate in (0.1, 0.2) for policy in POLICIES]
    console = Console(width=120, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(serving_table(spec, results))
    shown = console.export_text()
    assert shown.count("slices-lent") == 2 and "tokens a second from lent memory" in shown
    write_serving_report(tmp_path / "report", spec, results)
    with (tmp_path / "report/serving.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == [*POLICIES, *POLICIES]
    assert float(rows[0]["first_p50_s"]) > 0
    page = (tmp_path / "report/report.html").read_text()
    assert ("First token of the burst" in page) == has_burst


def test_the_command(tmp_path):
    from dask_pcm.simulation.scenario.read import _SHIPPED

    text = (_SHIPPED / "burst.yaml").read_text().replace("[0.5, 1, 1.6, 2, 3]", "[0.5]")
    (tmp_path / "mine.yaml").write_text(text)
    args = ["simulate", str(tmp_path / "mine.yaml"), "--report", str(tmp_path / "report")]
    found = CliRunner().invoke(main, args)
    assert found.exit_code == 0 and "first-come" in found.output, found.output
    assert (tmp_path / "report/report.html").exists()
    for more, text in ((["--policy", "all"], "has its own"), (["--report", "/proc/x"], "/proc/x")):
        refused = CliRunner().invoke(main, [*args[:2], *more])
        assert refused.exit_code == 2 and text in refused.output
