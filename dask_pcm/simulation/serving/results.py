"""What requests waited and how many were answered, by their rate: a table, CSV and plots."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from dask_pcm.simulation.results.plots import require_bokeh
from dask_pcm.simulation.serving.device import POLICIES, Played, long_prompt_rate
from dask_pcm.simulation.serving.spec import Serving

_HEADINGS = {
    "rate": "requests\na second",
    "policy": "policy",
    "first_p50_s": "first token,\np50 (s)",
    "first_p99_s": "first token,\np99 (s)",
    "burst_p50_s": "of the burst,\np50 (s)",
    "burst_p99_s": "of the burst,\np99 (s)",
    "tokens_s": "tokens\na second",
    "moved_share": "time of\ncopies",
}


def figures(played: Played) -> dict[str, float | str]:
    """All figures, by name."""
    has_burst = any(one.is_of_burst for one in played.requests)
    return {
        "rate": played.rate,
        "policy": played.policy,
        "first_p50_s": played.first_s(0.5),
        "first_p99_s": played.first_s(0.99),
        "burst_p50_s": played.first_s(0.5, of_burst=True) if has_burst else 0.0,
        "burst_p99_s": played.first_s(0.99, of_burst=True) if has_burst else 0.0,
        "tokens_s": played.tokens_s,
        "moved_share": played.moved_s / played.end_s if played.end_s else 0.0,
    }


def serving_table(spec: Serving, results: Sequence[Played]) -> Table:
    """A line for each rate and policy."""
    shown = Table(title=spec.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for played in results:
        found = figures(played)
        shown.add_row(*(f"{v:.3g}" if isinstance(v, float) else v for v in found.values()))
    lent, host = (long_prompt_rate(spec, link) for link in (spec.lent, spec.host))
    shown.caption = (
        f"A prompt of {spec.long_tokens:,} tokens: {lent:.3g} tokens a second from lent memory,"
        f" {host:.3g} from the host's."
    )
    return shown


def write_serving_report(folder: Path, spec: Serving, results: Sequence[Played]) -> None:
    """Write serving.csv and report.html.

    Raises
    ------
    ScenarioError
        If Bokeh is not installed.
    """
    page = html(spec, results)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "serving.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _HEADINGS)
        writer.writeheader()
        writer.writerows(figures(played) for played in results)
    (folder / "report.html").write_text(page, encoding="utf-8")


def html(spec: Serving, results: Sequence[Played]) -> str:
    """A self-contained page: the wait for the first token and tokens a second, by rate."""
    require_bokeh()
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.models.widgets import Div
    from bokeh.palettes import Category10_10
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    names = {"first_p50_s": "First token, p50 (s)", "first_p99_s": "First token, p99 (s)"}
    if spec.burst is not None:
        names |= {"burst_p50_s": "First token of the burst, p50 (s)"}
        names |= {"burst_p99_s": "First token of the burst, p99 (s)"}
    names |= {"tokens_s": "Tokens generated a second"}
    parts: list[Any] = [Div(text=f"<h2>{spec.title}</h2>")]
    for name, title in names.items():
        axis: Literal["linear", "log"] = "linear" if name == "tokens_s" else "log"
        plot = figure(
            title=title, width=900, height=300, x_axis_label="requests a second", y_axis_type=axis
        )
        for number, policy in enumerate(POLICIES):
            mine = [figures(played) for played in results if played.policy == policy]
            where = [one["rate"] for one in mine], [one[name] for one in mine]
            color = Category10_10[number]
            plot.line(*where, legend_label=policy, color=color, line_width=2)
            plot.scatter(*where, color=color, size=6)
        plot.legend.location = "top_left"
        parts.append(plot)
    return str(file_html(column(*parts), INLINE, title=spec.title))
