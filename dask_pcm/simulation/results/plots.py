"""Plots of simulations in one HTML file; needs Bokeh (extra ``monitoring``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from dask_pcm.errors import ScenarioError
from dask_pcm.simulation.results.progress import progress
from dask_pcm.simulation.simulate import Result

_COLORS = {"stage": "#b8b8b8", "load": "#e0a030", "work": "#3b78b0", "failed": "#c03030"}


def require_bokeh() -> None:
    """Raise ScenarioError, with installation instructions, if Bokeh is missing."""
    if importlib.util.find_spec("bokeh") is None:
        raise ScenarioError(
            "A report needs Bokeh, which is not installed: pip install 'dask-pcm[monitoring]', or"
            " leave --report out."
        )


def html(results: Sequence[tuple[str, Result]]) -> str:
    """Return a self-contained HTML page; raise ScenarioError without Bokeh."""
    require_bokeh()
    # Imported here: a simulation without a report needs no Bokeh.
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.models.widgets import Div
    from bokeh.palettes import Category10_10
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    scenario = results[0][1].scenario
    wide: dict[str, Any] = {"width": 1000, "height": 320, "x_axis_label": "seconds"}
    rows = figure(title="Rows done", **wide)
    workers = figure(title="Workers: joined (dashed) and warm", **wide)
    parts: list[Any] = [Div(text=f"<h2>{scenario.title}</h2>"), rows, workers]
    for number, (variant, result) in enumerate(results):
        label = f"{result.policy} {variant}".strip()
        at_s, done, joined, warm = progress(result)
        line: dict[str, Any] = {
            "legend_label": label,
            "color": Category10_10[number % 10],
            "line_width": 2,
        }
        rows.line(at_s, done, **line)
        workers.line(at_s, joined, line_dash="dashed", **line)
        workers.line(at_s, warm, **line)
        parts.append(_gantt(label, result, figure))
    for plot in (rows, workers):
        plot.legend.click_policy = "hide"
    return str(file_html(column(*parts), INLINE, title=scenario.title))


def _gantt(label: str, result: Result, figure: Any) -> Any:
    """A Gantt chart of the recorded workers."""
    spans = result.record.spans
    names = sorted({span.worker for span in spans}, reverse=True)
    plot = figure(
        title=f"A sample of workers: {label}",
        width=1000,
        height=120 + 14 * len(names),
        y_range=names,
        x_axis_label="seconds",
        output_backend="webgl",
    )
    for what, color in _COLORS.items():
        chosen = [span for span in spans if span.what == what]
        plot.hbar(
            y=[span.worker for span in chosen],
            left=[span.start_s for span in chosen],
            right=[span.end_s for span in chosen],
            height=0.8,
            color=color,
            legend_label=what,
        )
    return plot
