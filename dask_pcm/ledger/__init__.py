"""The ledger: the output's own record of what is done."""

from dask_pcm.ledger.report import Report
from dask_pcm.ledger.run import Run, attach
from dask_pcm.ledger.sample import Sample
from dask_pcm.ledger.status import Progress
from dask_pcm.ledger.write import write_parquet

__all__ = ["Progress", "Report", "Run", "Sample", "attach", "write_parquet"]
