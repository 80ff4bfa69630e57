"""A ``LocalCluster`` keeps a nanny whose worker was lost as long as the nanny tries to restart it.

Some seconds after a worker was lost (``distributed.deploy.lost-worker-timeout``), a Dask cluster
object checks once whether it is back, and otherwise discards what had started it. For a job of
a batch system that is right: the job is gone, and ``adapt()`` submits another one. A nanny in this
process is still there, and starts the next worker.

Whether a worker belongs to such a nanny is checked at each loss, not at installation: at that time
the cluster may have no workers yet. Everything here runs on the cluster's event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Nanny, SpecCluster
from distributed.core import Status

_TIMEOUT, _NEVER = "distributed.deploy.lost-worker-timeout", "52 weeks"
#: A nanny in one of these has a worker or is starting one.
_TRIES = (Status.init, Status.starting, Status.running)


def keep_local_nannies(cluster: SpecCluster) -> None:
    """Replace a cluster's reaction to lost workers; idempotent."""
    if "_update_worker_status" in vars(cluster):
        return
    update = cluster._update_worker_status

    def update_patiently(op: str, message: Any) -> None:
        name = _name(cluster, message) if op == "remove" else None
        if not isinstance(cluster.workers.get(name), Nanny):
            update(op, message)
            return
        _look_later(cluster, name)
        # Dask reads the timeout in this call: it still does the rest of its bookkeeping.
        with dask.config.set({_TIMEOUT: _NEVER}):
            update(op, message)

    cluster._update_worker_status = update_patiently


def forget_local_nannies(cluster: SpecCluster) -> None:
    """Restore Dask's own reaction to lost workers."""
    vars(cluster).pop("_update_worker_status", None)


def _name(cluster: SpecCluster, address: str) -> Any:
    """The name of the worker at an address."""
    return cluster.scheduler_info["workers"].get(address, {}).get("name")


def _look_later(cluster: SpecCluster, name: Any) -> None:
    """Check a nanny after Dask's own timeout."""
    timeout = parse_timedelta(dask.config.get(_TIMEOUT))
    asyncio.get_running_loop().call_later(timeout, _look, cluster, name)


def _look(cluster: SpecCluster, name: Any) -> None:
    """Discard a nanny that has given up, as Dask does, so that the cluster may replace it."""
    nanny = cluster.workers.get(name)
    is_back = any(info["name"] == name for info in cluster.scheduler_info["workers"].values())
    if nanny is None or is_back:
        return
    if nanny.status in _TRIES:
        _look_later(cluster, name)
        return
    cluster._futures.add(asyncio.ensure_future(nanny.close()))
    del cluster.workers[name]
