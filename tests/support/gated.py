"""``gen_cluster`` with the toolkit installed, wrapped once: it is not a stable API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed.utils_test import async_poll_for, gen_cluster

from dask_pcm.config import Config
from dask_pcm.plugins.nanny.plugin import KeeperPlugin
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.plugin import GATE, GatePlugin
from dask_pcm.plugins.worker.plugin import ContextPlugin
from tests.support.patience import patient


async def poll(condition: Callable[[], Any], seconds: float, **options: Any) -> None:
    await async_poll_for(condition, patient(seconds), **options)


async def install(client: Any, is_held: bool = False) -> Any:
    """Install on a cluster inside an event loop; return the gate.

    A gate that is held lets nothing through until ``release`` is called on it.
    """
    gate = HeldGate() if is_held else GatePlugin()
    await client.register_plugin(gate)
    await client.register_plugin(KeeperPlugin(Config.read()))
    await client.register_plugin(ContextPlugin(Config.read()))
    return client


class HeldHub(Hub):
    """Decides nothing until it is released."""

    is_held = True

    def _decide(self) -> None:
        if self.is_held:
            self._is_woken = False
        else:
            super()._decide()


class HeldGate(GatePlugin):
    """Everything parks until the test says so."""

    hub_type = HeldHub

    def release(self) -> None:
        self.hub.is_held = False
        self.hub.wake()


def gated(nthreads: Any = 2, is_held: bool = False, **options: Any) -> Callable[..., Any]:
    """A test ``async def test(c, s, gate, *workers)`` on a cluster with the toolkit.

    Scheduler validation is on; when the test ends the gate's state is validated.
    """
    options["timeout"] = patient(options.get("timeout", 30))
    cores = [("127.0.0.1", 1)] * nthreads if isinstance(nthreads, int) else nthreads

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @gen_cluster(client=True, nthreads=cores, **options)
        async def on_cluster(c: Any, s: Any, *workers: Any) -> None:
            await install(c, is_held)
            gate = s.plugins[GATE]
            await poll(lambda: len(gate.workers.members) == len(s.workers), 10)
            await test(c, s, gate, *workers)
            gate.state.validate()

        def run() -> None:  # without the parameters, which pytest would take for fixtures
            on_cluster()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
