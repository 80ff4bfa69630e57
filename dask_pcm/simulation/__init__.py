"""A discrete-event simulator of the gate's own policy and of the baselines from the papers."""

from dask_pcm.simulation.results.plots import require_bokeh
from dask_pcm.simulation.results.report import figures, table
from dask_pcm.simulation.results.report import write as write_report
from dask_pcm.simulation.scenario.read import read_any, read_scenario, shipped
from dask_pcm.simulation.scenario.scenario import Scenario
from dask_pcm.simulation.simulate import OURS, POLICIES, Result, simulate, variants

__all__ = [
    "OURS",
    "POLICIES",
    "Result",
    "Scenario",
    "figures",
    "read_any",
    "read_scenario",
    "require_bokeh",
    "shipped",
    "simulate",
    "table",
    "variants",
    "write_report",
]
