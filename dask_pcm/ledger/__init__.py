"""The ledger: the output folder's own record of what is done."""

from dask_pcm.ledger.report import Report
from dask_pcm.ledger.run import Run, write_parquet

__all__ = ["Report", "Run", "write_parquet"]
