"""Language models on Dask; torch and transformers are imported only when a model is loaded."""

from dask_pcm.inference.llm import LLM
from dask_pcm.inference.questions.reply import Reply
from dask_pcm.inference.verbs import classify, embed, generate, score

__all__ = ["LLM", "Reply", "classify", "embed", "generate", "score"]
