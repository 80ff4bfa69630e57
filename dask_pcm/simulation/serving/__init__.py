"""Requests to a language model on one device: who waits how long, by how memory is shared."""

from dask_pcm.simulation.serving.device import POLICIES, Played, long_prompt_rate, play
from dask_pcm.simulation.serving.results import serving_table, write_serving_report
from dask_pcm.simulation.serving.spec import Burst, Link, Serving, read_serving

__all__ = [
    "POLICIES",
    "Burst",
    "Link",
    "Played",
    "Serving",
    "long_prompt_rate",
    "play",
    "read_serving",
    "serving_table",
    "write_serving_report",
]
