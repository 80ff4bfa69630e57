"""Batch inference on GPUs that come and go, with Dask.

The model is loaded once a worker and kept, work goes where it is warm, and nothing finished is
ever done again. Importing this imports neither torch nor transformers.
"""

import dask_pcm.accessor as _accessor  # registers ddf.pcm with Dask  # noqa: F401
import dask_pcm.config as _config  # registers the defaults with Dask  # noqa: F401
from dask_pcm.context import Context
from dask_pcm.dataframe import map_partitions
from dask_pcm.errors import PCMError
from dask_pcm.inference import LLM, classify
from dask_pcm.ledger import Progress, Report, Run, Sample, attach, write_parquet
from dask_pcm.pieces import read_parquet
from dask_pcm.plugins import acquire, explain, install, release, uninstall
from dask_pcm.version import __version__

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
