"""Requests to a language model on one device: who waits how long, by how memory is shared."""

from dask_pcm.simulation.serving.spec import Burst, Link, Serving, read_serving

__all__ = ["Burst", "Link", "Serving", "read_serving"]
