"""A run that has lost its cluster: what Dask raises then, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from distributed import Client
from distributed.client import ClosedClientError
from distributed.comm import CommClosedError
from distributed.core import RPCClosed

from dask_pcm.errors import PCMError

#: Dask's own for a future that is cancelled derives from the last one.
_LOST = (CommClosedError, RPCClosed, ClosedClientError, CancelledError)


def lost(path: str, what: str) -> PCMError:
    """What a user is told where the cluster is gone, or has dropped what it was given."""
    return PCMError(
        f"The cluster dropped {what} of {path!r}: it was restarted or is gone, or its client was"
        " closed. What was committed stays; run the same again to go on."
    )


def unreachable(path: str, unit: str, error: BaseException) -> PCMError:
    """What a user is told where a unit did not reach a store: that of its input, or another."""
    return PCMError(
        f"A store that {unit} of {path!r} needs does not answer: {type(error).__name__}: {error}."
        " What was committed stays; run the same again to go on."
    )


@contextmanager
def cluster_errors_told(client: Client, path: str) -> Iterator[None]:
    """Say of errors that mean a lost cluster that they do.

    A client that is not connected raises a bit of everything, depending on where it was.

    Raises
    ------
    PCMError
        Caused by what was raised.
    """
    try:
        yield
    except PCMError:
        raise
    except Exception as error:
        if isinstance(error, _LOST) or client.status != "running":
            raise lost(path, "the run") from error
        raise
