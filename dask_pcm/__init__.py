"""Batch inference with Dask on GPUs that come and go.

The model is loaded once per worker and stays loaded, work is scheduled on workers that already hold
it, and finished rows are never computed again: after any crash, rerun the same call to resume.

Importing this package imports neither torch, transformers nor pandas. Each public name is imported
when it is first used, so a worker process imports only what its tasks need.
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
    from dask_pcm.inference import LLM, Reply, classify, embed, generate, score
    from dask_pcm.parquet.pieces import read_parquet
    from dask_pcm.plugins.install import explain, install, release, uninstall
    from dask_pcm.plugins.worker.task import acquire
    from dask_pcm.pools.cluster import PoolCluster
    from dask_pcm.pools.connection import connect
    from dask_pcm.pools.pool import Pool
    from dask_pcm.runs.handle import Run, attach
    from dask_pcm.runs.progress.progress import Progress
    from dask_pcm.runs.progress.report import Report
    from dask_pcm.runs.sampling import Sample, sample
    from dask_pcm.runs.write import write_parquet

#: The module that defines each public name.
_HOMES = {
    "Context": "dask_pcm.context.context",
    "map_partitions": "dask_pcm.frames.map_partitions",
    "LLM": "dask_pcm.inference",
    "Reply": "dask_pcm.inference",
    "classify": "dask_pcm.inference",
    "embed": "dask_pcm.inference",
    "generate": "dask_pcm.inference",
    "score": "dask_pcm.inference",
    "Pool": "dask_pcm.pools.pool",
    "PoolCluster": "dask_pcm.pools.cluster",
    "Progress": "dask_pcm.runs.progress.progress",
    "Report": "dask_pcm.runs.progress.report",
    "Run": "dask_pcm.runs.handle",
    "Sample": "dask_pcm.runs.sampling",
    "attach": "dask_pcm.runs.handle",
    "connect": "dask_pcm.pools.connection",
    "sample": "dask_pcm.runs.sampling",
    "write_parquet": "dask_pcm.runs.write",
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
    "Pool",
    "PoolCluster",
    "Progress",
    "Reply",
    "Report",
    "Run",
    "Sample",
    "__version__",
    "acquire",
    "attach",
    "classify",
    "connect",
    "embed",
    "explain",
    "generate",
    "install",
    "map_partitions",
    "read_parquet",
    "release",
    "sample",
    "score",
    "uninstall",
    "write_parquet",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    setattr(sys.modules[__name__], name, value)  # later look-ups do not come here
    return value


def __dir__() -> list[str]:
    """All public names, imported yet or not."""
    return sorted({*globals(), *__all__})


_register_accessor()
