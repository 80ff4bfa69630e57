"""Text models. torch and transformers are imported when a model is loaded, not before."""

from dask_pcm.inference.frame import classify
from dask_pcm.inference.llm import LLM

__all__ = ["LLM", "classify"]
