"""Runs: what drives the work on an output from the client, and what a unit does on a worker."""

from dask_pcm.runs.handle import Run, attach
from dask_pcm.runs.progress.progress import Progress
from dask_pcm.runs.progress.report import Report
from dask_pcm.runs.sampling import Sample, sample
from dask_pcm.runs.write import write_parquet

__all__ = ["Progress", "Report", "Run", "Sample", "attach", "sample", "write_parquet"]
