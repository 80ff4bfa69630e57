"""The nanny keeps what a killed worker needs again: images of contexts, and a fork server.

The plugin's methods run on the nanny's event loop. ``NannyLink`` is the worker's side.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Nanny, Worker
from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin
from distributed.system import MEMORY_LIMIT

from dask_pcm.config import Config
from dask_pcm.ladder.objects.shelf import Shelf
from dask_pcm.plugins.interrupts import interrupts
from dask_pcm.plugins.nanny.fork_server import fork_server
from dask_pcm.plugins.shipping import ShippedPlugin
from dask_pcm.plugins.signals import is_command, signals

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
#: Between two looks whether the worker can be reached.
_LOOK_S = 0.05
_MODELS = "transformers.models."


def host_budget_bytes(config: Config, environ: Mapping[str, str], limit: int | None) -> int:
    """What the images of this nanny's workers may take, in bytes.

    By default half of the job's memory. The workers of a job whose nannies are processes of their
    own (see ``pools/launcher.py``) have equal shares.

    Parameters
    ----------
    limit
        What a worker may take, in bytes.
    """
    n_nannies = int(environ.get("PCM_JOB_WORKERS", "0"))
    if config.host_budget_bytes is not None:
        return config.host_budget_bytes // max(1, n_nannies)
    # A job may be granted less than what the kernel would let it take.
    granted = limit * n_nannies if limit and n_nannies else MEMORY_LIMIT
    return min(MEMORY_LIMIT, granted) // 2 // max(1, n_nannies)


@functools.cache
def _shelves() -> weakref.WeakValueDictionary[str, Shelf]:
    """The shelves of this process, by scheduler address; each lives as long as a nanny uses it."""
    return weakref.WeakValueDictionary()


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
        shelf = Shelf(host_budget_bytes(self.config, os.environ, self._limit))
        self._shelf: Shelf | None = _shelves().setdefault(nanny.scheduler_addr, shelf)
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
        if self._shelf is not None:
            self._shelf.clear(self._own(""))
            self._shelf.leave(nanny.address)
        self._shelf = None
        fork_server().release(nanny)

    @property
    def _handlers(self) -> dict[str, Any]:
        """RPCs of the worker and the scheduler, by operation."""
        return {
            "pcm_allow_memory": self.allow_memory,
            "pcm_fork_server": self.use_fork_server,
            "pcm_begin": self.begin,
            "pcm_find": self.find,
            "pcm_keep": self.keep,
            "pcm_pin": self.pin,
            "pcm_unpin": self.unpin,
            "pcm_drop": self.drop,
            "pcm_clear": self.clear,
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

    def begin(self) -> None:
        """A worker process begins: what only the one before could use is dropped."""
        if self._shelf is not None:
            self._shelf.leave(self._nanny.address)

    def allow_memory(self, n_bytes: int) -> None:
        """Raise the limit at which the worker is killed by `n_bytes`; see ``MemoryAllowance``."""
        if self._limit:
            self._nanny.memory_manager.memory_limit = self._limit + n_bytes

    def use_fork_server(self, models: Sequence[str]) -> None:
        """Start the next worker process from the fork server, with these models imported too."""
        if self.config.imports:
            models = [name for name in models if name.startswith(_MODELS)]
            fork_server().use(self._nanny, [*self.config.imports, *models])

    def find(self, digest: str) -> str | None:
        """The path of a context's memory file: this worker's own, or the one of the whole host."""
        assert self._shelf is not None
        return next(filter(None, map(self._shelf.find, self._names(digest))), None)

    def keep(
        self, digest: str, path: str, n_bytes: int, is_shared: bool, is_pinned: bool
    ) -> bool | None:
        """Keep a memory file that the worker has open; see ``Shelf.keep``."""
        assert self._shelf is not None
        name = digest if is_shared else self._own(digest)
        return self._shelf.keep(name, path, n_bytes, self._nanny.address if is_pinned else None)

    def pin(self, digest: str) -> bool:
        """Keep a file until ``unpin``; False if it is not there any more."""
        assert self._shelf is not None
        return any(self._shelf.pin(name, self._nanny.address) for name in self._names(digest))

    def unpin(self, digest: str) -> None:
        """The worker does not depend on a file any more."""
        if self._shelf is not None:
            for name in self._names(digest):
                self._shelf.unpin(name, self._nanny.address)

    def drop(self, digest: str) -> None:
        """Drop a context's memory files."""
        if self._shelf is not None:
            for name in self._names(digest):
                self._shelf.drop(name, self._nanny.address)

    def clear(self) -> None:
        """Drop all memory files of the cluster on this host."""
        if self._shelf is not None:
            self._shelf.clear()

    def _names(self, digest: str) -> tuple[str, str]:
        """The files that may be a context's: this worker's own comes first."""
        return self._own(digest), digest

    def _own(self, digest: str) -> str:
        """The name of a file that only this nanny's worker uses: it belongs on its device."""
        return f"{digest} {self._nanny.address}"


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

    def pin(self, digest: str) -> bool:
        """See ``Keeper``."""
        return bool(self.ask("pcm_pin", digest=digest))

    def unpin(self, digest: str) -> None:
        """See ``Keeper``."""
        self.ask("pcm_unpin", digest=digest)

    def drop(self, digest: str) -> None:
        """See ``Keeper``."""
        self.ask("pcm_drop", digest=digest)
