"""``dask-pcm`` uses the cluster at ``--scheduler``, or starts one: pools, or on this machine."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from distributed import Client, LocalCluster, Worker
from distributed.diagnostics.plugin import WorkerPlugin

from dask_pcm.cli.errors import say
from dask_pcm.errors import InstallError
from dask_pcm.pools.cluster import PoolCluster
from dask_pcm.pools.connection import connect, raise_if_refused
from dask_pcm.runs.progress.interrupt import deferred


@contextmanager
def client_of(
    workers: int | None, scheduler: str | None, cluster: str | None = None
) -> Iterator[Client]:
    """Connect to a running scheduler, or to a new cluster that ends with the block.

    Parameters
    ----------
    workers
        Workers of a local cluster.
    scheduler
        An address, or the connection file of a cluster of pools.
    cluster
        A file with pools, which follow the work.

    Raises
    ------
    InstallError
        If no scheduler answers at the address.
    PoolError
        If a file cannot be used, or a batch system refuses its jobs.
    """
    if scheduler:
        try:
            is_file = "://" not in scheduler and (
                os.sep in scheduler or ":" not in scheduler or os.path.exists(scheduler)
            )
            if not is_file and not scheduler.startswith("tls://"):  # whose certificates Dask has
                raise_if_refused(scheduler)
            client = connect(scheduler) if is_file else Client(scheduler)
        except (OSError, ValueError) as error:
            raise InstallError(f"No scheduler answers at {scheduler!r}: {error}.") from error
        with client:
            yield client
        return
    with ExitStack() as stack:
        # Only a cluster that has started can be closed: Ctrl-C waits for that.
        with deferred(lambda: say("Interrupted: ending as soon as it has started.", err=True)):
            client = _started(stack, workers, cluster)
        yield client


def _started(stack: ExitStack, workers: int | None, pools: str | None) -> Client:
    """The client of a new cluster; `stack` ends both."""
    if pools:
        pooled = stack.enter_context(PoolCluster(pools))
        pooled.adapt()
        return stack.enter_context(Client(pooled))
    local = LocalCluster(
        n_workers=workers or 2,
        threads_per_worker=1,
        dashboard_address=":0",
        preload_nanny=["dask_pcm.preload"],
    )
    client = stack.enter_context(Client(stack.enter_context(local)))
    client.register_plugin(_EndsWithDriver())
    return client


class _EndsWithDriver(WorkerPlugin):  # type: ignore[misc] # its types are not shipped
    """Ties workers of the command's own cluster to the command; also workers that restarted."""

    name = "dask_pcm-cli"

    def setup(self, worker: Worker) -> None:
        """Ignore Ctrl-C, and do not log that the scheduler is gone.

        A terminal sends SIGINT to all processes of the command. The driver cancels the run; if
        workers died first, their rows in flight would be lost.
        """
        with suppress(ValueError):  # not on the main thread: that process handles Ctrl-C itself
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        logging.getLogger("distributed.worker").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop the message that every worker logs when the command's scheduler ends first."""
    return "Failed to communicate with scheduler during heartbeat" not in record.getMessage()
