"""For clusters that others start: ``dask scheduler --preload dask_pcm.preload``.

On a scheduler it installs what ``dask_pcm.install(client)`` would, for every client and for all
workers that join. Settings are read where the scheduler runs, from its Dask configuration under
``pcm``.

With ``dask worker --preload-nanny dask_pcm.preload``, or
``LocalCluster(preload_nanny=["dask_pcm.preload"])``, workers begin in a process that has torch and
transformers imported. Without it, they do so from the first restart on. Workers of a
``LocalCluster`` also live on when the client is interrupted; without the preload they do so from
``install`` on. (On workers ``--preload``
is allowed and does nothing: they get their side from the scheduler.)
"""

from __future__ import annotations

from typing import Any

from distributed import Nanny, Scheduler
from distributed.protocol.pickle import dumps

from dask_pcm.config import Config
from dask_pcm.plugins.interrupts import interrupts
from dask_pcm.plugins.nanny.fork_server import rebirth
from dask_pcm.plugins.nanny.plugin import KeeperPlugin
from dask_pcm.plugins.scheduler.plugin import GatePlugin
from dask_pcm.plugins.worker.plugin import ContextPlugin


async def dask_setup(server: Any) -> None:
    """Called by Dask with the scheduler, worker or nanny that starts."""
    if isinstance(server, Nanny):
        interrupts().block(server)
        rebirth().use(server, Config.read().imports)
    if not isinstance(server, Scheduler):
        return
    config = Config.read()
    await server.register_scheduler_plugin(GatePlugin(config), idempotent=True)
    for plugin, register in (
        (KeeperPlugin(config), server.register_nanny_plugin),
        (ContextPlugin(config), server.register_worker_plugin),
    ):
        await register(None, dumps(plugin), name=plugin.name, idempotent=True)


def dask_teardown(server: Any) -> None:
    """Called by Dask with what ends."""
    if isinstance(server, Nanny):
        interrupts().unblock(server)
        rebirth().leave(server)
