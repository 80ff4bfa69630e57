"""For clusters that others start: ``dask scheduler --preload dask_pcm.preload``.

On a scheduler it installs what ``dask_pcm.install(client)`` would, for every client and for all
workers that join. On workers and nannies it is allowed and does nothing: they get theirs from the
scheduler. Settings are read where the scheduler runs, from its Dask configuration under ``pcm``.
"""

from __future__ import annotations

from typing import Any

from distributed import Scheduler
from distributed.protocol.pickle import dumps

from dask_pcm.config import Config
from dask_pcm.plugins.memory import AllowancePlugin
from dask_pcm.plugins.scheduler import GatePlugin
from dask_pcm.plugins.worker import ContextPlugin


async def dask_setup(server: Any) -> None:
    """Called by Dask with the scheduler, worker or nanny that starts."""
    if not isinstance(server, Scheduler):
        return
    config = Config.read()
    await server.register_scheduler_plugin(GatePlugin(config), idempotent=True)
    for plugin, register in (
        (AllowancePlugin(), server.register_nanny_plugin),
        (ContextPlugin(config), server.register_worker_plugin),
    ):
        await register(None, dumps(plugin), name=plugin.name, idempotent=True)
