"""Nannies that live in the client's process, as those of a ``LocalCluster`` do.

Some seconds after it has lost a worker (``distributed.deploy.lost-worker-timeout``) a Dask cluster
object looks once whether it is back, and drops what had started it for good if it is not. For a job
of a batch system that is right: the job is gone, and ``adapt()`` submits another. A nanny in this
process is not gone: it has just seen its worker killed once more, and starts the next one.

So that nannies are kept for as long as they try, and all else goes as ever, each loss is looked at
by what had started that worker, when it happens: there may be no worker yet when the toolkit comes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Nanny, SpecCluster
from distributed.core import Status

_TIMEOUT, _NEVER = "distributed.deploy.lost-worker-timeout", "52 weeks"
_TRIES = (Status.init, Status.starting, Status.running)


def keep_local_nannies(cluster: SpecCluster) -> None:
    """Have a cluster keep nannies of this process whose workers are killed, while they try."""
    if "_update_worker_status" in vars(cluster):
        return
    update = cluster._update_worker_status

    def update_patiently(op: str, message: Any) -> None:
        name = _name(cluster, message) if op == "remove" else None
        if not isinstance(cluster.workers.get(name), Nanny):
            update(op, message)
            return
        _look_later(cluster, name)
        with dask.config.set({_TIMEOUT: _NEVER}):
            update(op, message)

    cluster._update_worker_status = update_patiently


def forget_local_nannies(cluster: SpecCluster) -> None:
    """Have a cluster look after its nannies as Dask does."""
    vars(cluster).pop("_update_worker_status", None)


def _name(cluster: SpecCluster, address: str) -> Any:
    return cluster.scheduler_info["workers"].get(address, {}).get("name")


def _look_later(cluster: SpecCluster, name: Any) -> None:
    timeout = parse_timedelta(dask.config.get(_TIMEOUT))
    asyncio.get_running_loop().call_later(timeout, _look, cluster, name)


def _look(cluster: SpecCluster, name: Any) -> None:
    """Drop a nanny that starts no worker any more, as Dask does: it may be replaced."""
    nanny = cluster.workers.get(name)
    is_back = any(info["name"] == name for info in cluster.scheduler_info["workers"].values())
    if nanny is None or is_back:
        return
    if nanny.status in _TRIES:
        _look_later(cluster, name)
        return
    cluster._futures.add(asyncio.ensure_future(nanny.close()))
    del cluster.workers[name]
