"""What workers do with batches of rows: choose answers, score texts, continue or embed prompts."""

from dask_pcm.inference.calls.classify import Answer, Classify
from dask_pcm.inference.calls.embed import Embed, Vector
from dask_pcm.inference.calls.generate import Continuation, Generate
from dask_pcm.inference.calls.prompted import ERROR, Prompted
from dask_pcm.inference.calls.score import Score, TextScore

__all__ = [
    "ERROR",
    "Answer",
    "Classify",
    "Continuation",
    "Embed",
    "Generate",
    "Prompted",
    "Score",
    "TextScore",
    "Vector",
]
