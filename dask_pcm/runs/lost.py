"""The error of a run that has lost its cluster, from the many that Dask raises then."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from distributed import Client
from distributed.client import ClosedClientError
from distributed.comm import CommClosedError
from distributed.core import RPCClosed

from dask_pcm.errors import PCMError

#: Dask's FutureCancelledError derives from the last one.
_LOST = (CommClosedError, RPCClosed, ClosedClientError, CancelledError)


def lost(path: str, what: str) -> PCMError:
    """The error where the cluster is gone, or has dropped the run's tasks."""
    return PCMError(
        f"The cluster dropped {what} of {path!r}: it was restarted or is gone, or its client was"
        " closed. What was committed stays; rerun the same call to resume."
    )


def unreachable(path: str, unit: str, error: BaseException) -> PCMError:
    """The error where a unit could not reach a store, that of its input or another."""
    return PCMError(
        f"A store that {unit} of {path!r} needs does not answer: {type(error).__name__}: {error}."
        " What was committed stays; rerun the same call to resume."
    )


@contextmanager
def cluster_errors_told(client: Client, path: str | None) -> Iterator[None]:
    """Turn errors that mean a lost cluster into one that says so.

    A client that loses its connection raises many types, depending on the call. `path` is the
    output of a run; None for a sample.

    Raises
    ------
    PCMError
        With the original error as its cause.
    """
    try:
        yield
    except PCMError:
        raise
    except Exception as error:
        if isinstance(error, _LOST) or client.status != "running":
            if path is None:
                raise PCMError(
                    "The cluster dropped the sample: it was restarted or is gone, or its client was"
                    " closed. Nothing was written; sample again on a new client."
                ) from error
            raise lost(path, "the run") from error
        raise
