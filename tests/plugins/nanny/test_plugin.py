"""A nanny is told that its time ends."""

from __future__ import annotations

import time

import dask
import pytest
from distributed import Client
from distributed.system import MEMORY_LIMIT

import dask_pcm as pcm
from dask_pcm.config import Config
from dask_pcm.plugins.nanny.images import host_budget_bytes
from dask_pcm.plugins.nanny.plugin import KeeperPlugin
from tests.conftest import validated_cluster
from tests.support.patience import patient, until


def test_a_notice_before_the_nanny_knows_its_worker_ends_no_task():
    with validated_cluster(n_workers=1) as cluster, Client(cluster) as client:
        pcm.install(client)
        (nanny,) = cluster.workers.values()
        plugin = nanny.plugins[KeeperPlugin.name]
        last = client.submit(time.sleep, 1.0)
        until(lambda: any(client.processing().values()))
        address, nanny.process.worker_address = nanny.process.worker_address, None
        cluster.loop.add_callback(plugin.on_notice, patient(20.0))
        until(lambda: plugin._notice is not None)
        assert not plugin._notice.done()
        nanny.process.worker_address = address
        until(lambda: plugin._notice.done())
        assert plugin._notice.exception() is None
        # It drains: the task ends here, and the worker leaves as one that was expected to.
        last.result(timeout=patient(20))
        until(lambda: not client.scheduler_info()["workers"])
        events = [event for _, event in client.get_events("all")]
        (removed,) = [event for event in events if event["action"] == "remove-worker"]
        assert removed["expected"]


@pytest.mark.parametrize(
    ("budget", "environ", "limit", "found"),
    [
        (None, {}, 1 << 30, MEMORY_LIMIT // 2),
        ("6 GiB", {}, 0, 6 << 30),
        # Four workers of a job of 8 GiB, on a host that has more, and is not limited to that.
        (None, {"PCM_JOB_WORKERS": "4"}, 2 << 30, 1 << 30),
        (None, {"PCM_JOB_WORKERS": "1"}, 2 << 30, 1 << 30),
        (None, {"PCM_JOB_WORKERS": "4"}, 0, MEMORY_LIMIT // 8),
        ("6 GiB", {"PCM_JOB_WORKERS": "4"}, 2 << 30, 3 << 29),
    ],
)
def test_the_workers_of_a_job_divide_its_host_memory(budget, environ, limit, found):
    with dask.config.set({"pcm.ladder.host.budget": budget}):
        assert host_budget_bytes(Config.read(), environ, limit) == found
