"""The nanny keeps what a killed worker needs again: images of contexts, and a fork server.

The plugin's methods run on the nanny's event loop; the images are in ``images.py``. The worker's
side is ``NannyLink``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from distributed import Nanny, Worker
from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin

from dask_pcm.config import Config
from dask_pcm.plugins.interrupts import interrupts
from dask_pcm.plugins.nanny.fork_server import fork_server
from dask_pcm.plugins.nanny.images import HostImages, host_budget_bytes
from dask_pcm.plugins.shipping import ShippedPlugin
from dask_pcm.plugins.signals import is_command, signals

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
#: Between two looks whether the worker can be reached.
_LOOK_S = 0.05
_MODELS = "transformers.models."


async def _tell_worker(nanny: Nanny, seconds: float) -> None:
    """Tell a nanny's worker that its time ends, once it can be reached."""
    began = time.monotonic()
    # A worker may have tasks before its nanny knows its address.
    while nanny.worker_address is None:
        await asyncio.sleep(_LOOK_S)
    left = seconds - (time.monotonic() - began)
    await nanny.rpc(nanny.worker_address).pcm_notice(seconds=left)


class KeeperPlugin(ShippedPlugin, NannyPlugin):
    """Keeps images for the worker's successor, starts it fast, and drains it on a notice."""

    name = "pcm-keeper"
    idempotent = True

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config.read()

    def setup(self, nanny: Nanny) -> None:
        """Dask's hook: register the handlers."""
        self._nanny = nanny
        manager = nanny.memory_manager
        self._limit = manager.memory_limit if manager else None
        self.images = HostImages(nanny, host_budget_bytes(self.config, os.environ, self._limit))
        self._handlers = {**self._own_handlers(), **self.images.handlers()}
        nanny.handlers.update(self._handlers)
        self._notice: asyncio.Task[None] | None = None
        interrupts().block(self)
        if is_command():
            signals().listen(self, self.on_notice, self.config.here().notice_s)

    def teardown(self, nanny: Any) -> None:
        """Dask's hook: undo all that ``setup`` and the handlers did."""
        signals().ignore(self)
        interrupts().unblock(self)
        for name in self._handlers:
            nanny.handlers.pop(name, None)
        self.allow_memory(0)
        self.images.close()
        fork_server().release(nanny)

    def _own_handlers(self) -> dict[str, Any]:
        """RPCs of the worker and the scheduler, by operation."""
        return {
            "pcm_allow_memory": self.allow_memory,
            "pcm_fork_server": self.use_fork_server,
            "pcm_listens_to_signals": self.listens_to_signals,
            "pcm_end": self.end,
        }

    def on_notice(self, seconds: float) -> None:
        """The batch system ends this process in `seconds`: drain the worker."""
        self._notice = asyncio.get_running_loop().create_task(self._give_notice(seconds))

    async def _give_notice(self, seconds: float) -> None:
        """Pass a notice on to the worker; close the nanny if the worker cannot drain."""
        nanny = self._nanny
        try:
            await asyncio.wait_for(_tell_worker(nanny, seconds), min(_TIMEOUT_S, seconds / 2))
        except Exception as error:  # it is starting, has just ended, or hangs
            logger.warning(
                "The worker of %s cannot drain, so it is closed: %r", nanny.address, error
            )
            await nanny.close(timeout=_TIMEOUT_S, reason="notice")

    def listens_to_signals(self) -> bool:
        """Whether signals are notices in this process, and therefore in its worker's too."""
        return signals().is_listening

    async def end(self, seconds: float) -> bool:
        """End the worker process, which has handed over its results, and this nanny.

        Does not wait for tasks that still run: after `seconds` the process is killed.
        """
        nanny = self._nanny
        if nanny.process is None:
            return False
        nanny.close_gracefully(reason="notice")  # so that it does not start another worker
        # From this side, because a worker that closes itself waits for two seconds before it ends.
        self._ending = asyncio.get_running_loop().create_task(
            nanny.process.kill(timeout=seconds, executor_wait=False, reason="notice")
        )
        return True

    def allow_memory(self, n_bytes: int) -> None:
        """Raise the limit at which the worker is killed by `n_bytes`; see ``MemoryAllowance``."""
        if self._limit:
            self._nanny.memory_manager.memory_limit = self._limit + n_bytes

    def use_fork_server(self, models: Sequence[str]) -> None:
        """Start the next worker process from the fork server, with these models imported too."""
        if self.config.imports:
            models = [name for name in models if name.startswith(_MODELS)]
            fork_server().use(self._nanny, [*self.config.imports, *models])


class NannyLink:
    """The worker's side: calls handlers of the nanny. Implements ``host.Keeper``.

    Methods block; for any thread but the event loop's.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._has_fork_server = self._is_over = False

    def close(self) -> None:
        """Call the nanny no longer; the toolkit is being uninstalled there too."""
        self._is_over = True

    def ask(self, op: str, **says: Any) -> Any:
        """Call a handler of the nanny; None if there is no nanny or it does not answer."""
        worker = self._worker
        if not worker.nanny or self._is_over:
            return None
        asked = getattr(worker.rpc(worker.nanny), op)(**says)
        try:
            told = asyncio.run_coroutine_threadsafe(asked, worker.loop.asyncio_loop)
            return told.result(_TIMEOUT_S)
        except Exception as error:
            # Otherwise nanny and worker are shutting down, and no answer is expected.
            if worker.status is Status.running and not self._is_over:
                logger.warning("The nanny of %s does not answer %s: %r", worker, op, error)
            return None

    def begin(self) -> None:
        """This process has begun; the nanny forgets what only the one before could use."""
        self.ask("pcm_begin")

    def use_fork_server(self) -> None:
        """Start this worker's successor from the fork server; asks the nanny once."""
        if not self._has_fork_server:
            self._has_fork_server = True
            imported = list(sys.modules)  # a copy: other threads go on importing
            self.ask(
                "pcm_fork_server", models=[name for name in imported if name.startswith(_MODELS)]
            )

    def find(self, digest: str) -> str | None:
        """See ``Keeper``."""
        path: str | None = self.ask("pcm_find", digest=digest)
        return path

    def keep(
        self, digest: str, path: str, n_bytes: int, is_shared: bool, is_pinned: bool
    ) -> bool | None:
        """See ``Keeper``."""
        says = {"digest": digest, "path": path, "n_bytes": n_bytes}
        flags = {"is_shared": is_shared, "is_pinned": is_pinned}
        is_kept: bool | None = self.ask("pcm_keep", **says, **flags)
        return is_kept

    def keep_loan(self, name: str, path: str, n_bytes: int) -> bool | None:
        """See ``Keeper``."""
        is_kept: bool | None = self.ask("pcm_keep_loan", name=name, path=path, n_bytes=n_bytes)
        return is_kept

    def pin(self, digest: str) -> bool:
        """See ``Keeper``."""
        return bool(self.ask("pcm_pin", digest=digest))

    def unpin(self, digest: str) -> None:
        """See ``Keeper``."""
        self.ask("pcm_unpin", digest=digest)

    def drop(self, digest: str) -> None:
        """See ``Keeper``."""
        self.ask("pcm_drop", digest=digest)
