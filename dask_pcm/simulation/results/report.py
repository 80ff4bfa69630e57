"""Reports of simulations: a table, CSV files, and an HTML file with plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dask_pcm.simulation.results.plots import html
from dask_pcm.simulation.results.progress import progress
from dask_pcm.simulation.simulate import Result

#: Reported figures by name; columns of summary.csv.
_FIGURES: dict[str, Callable[[Result], float]] = {
    "makespan_s": lambda result: result.makespan_s,
    "bound_s": lambda result: result.bound_s,
    "over_bound": lambda result: result.over_bound,
    "rows_per_s": lambda result: result.rows_per_s,
    "possible_share": lambda result: result.possible_share,
    "rows_done": lambda result: result.record.n_rows,
    "rows_redone": lambda result: result.record.rows_redone,
    "rows_failed": lambda result: result.record.rows_failed,
    "lost_s": lambda result: result.record.lost_s,
    "loads": lambda result: result.record.n_loads,
    "failed_loads": lambda result: result.record.n_failed_loads,
    "load_s": lambda result: result.record.load_s,
    "wasted_load_s": lambda result: result.record.wasted_s,
    "workers_joined": lambda result: result.record.n_joined,
    "workers_lost": lambda result: result.record.n_lost,
    "dispatches": lambda result: result.record.n_dispatches,
}
#: Figures in the table, with their headings. Wasted and lost times are worker-seconds.
_SHOWN = {
    "makespan_s": "makespan\n(s)",
    "rows_per_s": "rows/s",
    "bound_s": "bound\n(s)",
    "over_bound": "over\nbound",
    "loads": "loads",
    "failed_loads": "failed\nloads",
    "wasted_load_s": "wasted\nloading (s)",
    "rows_redone": "rows\nredone",
    "lost_s": "work\nlost (s)",
}


def figures(result: Result) -> dict[str, float]:
    """All figures of a simulation by name, in seconds, rows and counts."""
    return {name: figure(result) for name, figure in _FIGURES.items()}


def table(title: str, results: Sequence[tuple[str, Result]]) -> Table:
    """A table with a line per simulation; `results` are (variant label, result)."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    has_variants = any(variant for variant, _ in results)
    for name in ("variant", "policy") if has_variants else ("policy",):
        shown.add_column(name, no_wrap=True)
    for name in _SHOWN.values():
        shown.add_column(name, justify="right", no_wrap=True)
    for variant, result in results:
        found = figures(result)
        names = (variant, result.policy) if has_variants else (result.policy,)
        shown.add_row(*names, *(_text(name, found[name]) for name in _SHOWN))
    return shown


def write(folder: Path, results: Sequence[tuple[str, Result]]) -> None:
    """Write summary.csv, progress.csv, spans.csv and report.html.

    Raises
    ------
    ScenarioError
        If Bokeh is not installed.
    """
    page = html(results)
    folder.mkdir(parents=True, exist_ok=True)
    keyed = [([variant, result.policy, result.seed], result) for variant, result in results]
    keys = ["variant", "policy", "seed"]
    summary = ([*key, *figures(result).values()] for key, result in keyed)
    _write_csv(folder / "summary.csv", [*keys, *_FIGURES], summary)
    points = (
        [*key, *point] for key, result in keyed for point in zip(*progress(result), strict=True)
    )
    _write_csv(folder / "progress.csv", [*keys, "at_s", "rows", "joined", "warm"], points)
    spans = (
        [*key, span.worker, span.what, span.start_s, span.end_s]
        for key, result in keyed
        for span in result.record.spans
    )
    _write_csv(folder / "spans.csv", [*keys, "worker", "what", "start_s", "end_s"], spans)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _text(name: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "never"
    return f"{value:.3f}" if name == "over_bound" else f"{value:,.0f}"


def _write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(
            [round(value, 4) if isinstance(value, float) else value for value in row]
            for row in rows
        )
