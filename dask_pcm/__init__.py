"""Batch inference on GPUs that come and go, with Dask.

The model is loaded once a worker and kept, work goes where it is warm, and nothing finished is
ever done again. Importing this imports neither torch nor transformers, nor pandas: each name is
looked up when it is first used, so a worker pays for what its tasks need.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import dask_pcm.config as _config  # registers the defaults with Dask  # noqa: F401
from dask_pcm.errors import PCMError
from dask_pcm.registration import register_accessor as _register_accessor
from dask_pcm.version import __version__

if TYPE_CHECKING:
    from dask_pcm.context.context import Context
    from dask_pcm.frames.map_partitions import map_partitions
    from dask_pcm.inference import LLM, classify
    from dask_pcm.parquet.pieces import read_parquet
    from dask_pcm.plugins.install import explain, install, release, uninstall
    from dask_pcm.plugins.worker.task import acquire
    from dask_pcm.runs import Progress, Report, Run, Sample, attach, write_parquet

_HOMES = {
    "Context": "dask_pcm.context.context",
    "map_partitions": "dask_pcm.frames.map_partitions",
    "LLM": "dask_pcm.inference",
    "classify": "dask_pcm.inference",
    "Progress": "dask_pcm.runs",
    "Report": "dask_pcm.runs",
    "Run": "dask_pcm.runs",
    "Sample": "dask_pcm.runs",
    "attach": "dask_pcm.runs",
    "write_parquet": "dask_pcm.runs",
    "read_parquet": "dask_pcm.parquet.pieces",
    "acquire": "dask_pcm.plugins.worker.task",
    "explain": "dask_pcm.plugins.install",
    "install": "dask_pcm.plugins.install",
    "release": "dask_pcm.plugins.install",
    "uninstall": "dask_pcm.plugins.install",
}

__all__ = [
    "LLM",
    "Context",
    "PCMError",
    "Progress",
    "Report",
    "Run",
    "Sample",
    "__version__",
    "acquire",
    "attach",
    "classify",
    "explain",
    "install",
    "map_partitions",
    "read_parquet",
    "release",
    "uninstall",
    "write_parquet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    setattr(sys.modules[__name__], name, value)  # from now on it is found without this
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register_accessor()
