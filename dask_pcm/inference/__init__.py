"""Text models. torch and transformers are imported when a model is loaded, not before."""

from dask_pcm.inference.llm import LLM
from dask_pcm.inference.verbs import classify

__all__ = ["LLM", "classify"]
