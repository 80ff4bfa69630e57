"""The claims application: generated and real claims, and a small model that verifies them."""

from dask_pcm.factcheck.claims import LABELS, PROMPT, generate
from dask_pcm.factcheck.demo import demo_model

__all__ = ["LABELS", "PROMPT", "demo_model", "generate"]
