"""Spare memory of a worker, lent to its neighbours on the same host until it is wanted back."""

from dask_pcm.ladder.lending.informer import Informer
from dask_pcm.ladder.lending.leases import HOST, Lease, Leases
from dask_pcm.ladder.lending.lending import Lending
from dask_pcm.ladder.lending.loan import Loan

__all__ = ["HOST", "Informer", "Lease", "Leases", "Lending", "Loan"]
