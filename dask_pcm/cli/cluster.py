"""The cluster of the command ``dask-pcm``: one that runs already, or its own."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from distributed import Client, LocalCluster, Worker
from distributed.diagnostics.plugin import WorkerPlugin

from dask_pcm.errors import InstallError


@contextmanager
def client_of(workers: int | None, scheduler: str | None) -> Iterator[Client]:
    """A client of the cluster at an address, or of a local one for as long as it is used."""
    if scheduler:
        try:
            client = Client(scheduler)
        except (OSError, ValueError) as error:
            raise InstallError(f"No scheduler answers at {scheduler!r}: {error}.") from error
        with client:
            yield client
        return
    with (
        LocalCluster(
            n_workers=workers or 2,
            threads_per_worker=1,
            dashboard_address=":0",
            preload_nanny=["dask_pcm.preload"],
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(_EndsWithDriver())
        yield client


class _EndsWithDriver(WorkerPlugin):  # type: ignore[misc] # its types are not shipped
    """A worker of the command's own cluster, one that a nanny started again as well."""

    name = "dask_pcm-cli"

    def setup(self, worker: Worker) -> None:
        """Leave Ctrl-C to the driver, which cancels; a scheduler that is gone is no news."""
        with suppress(ValueError):  # worker in a thread: its process handles Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        logging.getLogger("distributed.worker").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "Failed to communicate with scheduler during heartbeat" not in record.getMessage()
