"""``dask scheduler --preload dask_pcm.preload`` installs the plugins without a client.

Use it for clusters whose start-up you configure but do not script. On the scheduler it does what
``dask_pcm.install(client)`` does, for all clients and all workers that join. Settings come from the
Dask configuration of the scheduler's process, under ``pcm``.

With ``dask worker --preload-nanny dask_pcm.preload`` or
``LocalCluster(preload_nanny=["dask_pcm.preload"])``, nannies fork workers from a process that has
torch and transformers imported. Without it, they do so from the first restart on. Workers of a
``LocalCluster`` also survive Ctrl-C in the client; without the preload, only once ``install`` has
been called.

On workers, ``--preload`` has no effect: the scheduler sends them their plugin.
"""

from __future__ import annotations

from typing import Any

from distributed import Nanny, Scheduler
from distributed.protocol.pickle import dumps

from dask_pcm.config import Config
from dask_pcm.plugins.interrupts import interrupts
from dask_pcm.plugins.nanny.fork_server import fork_server
from dask_pcm.plugins.nanny.plugin import KeeperPlugin
from dask_pcm.plugins.scheduler.plugin import GatePlugin
from dask_pcm.plugins.worker.plugin import ContextPlugin


async def dask_setup(server: Any) -> None:
    """Install the plugins on the server that starts; Dask's hook, called on its event loop."""
    if isinstance(server, Nanny):
        # Before the nanny starts its worker: the first worker must profit from both.
        interrupts().block(server)
        fork_server().use(server, Config.read().imports)
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
    """Undo the nanny's part when the server stops; Dask's hook."""
    if isinstance(server, Nanny):
        interrupts().unblock(server)
        fork_server().release(server)
