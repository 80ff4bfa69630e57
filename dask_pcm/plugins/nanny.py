"""The toolkit's side in a nanny: what has to outlive the worker process.

Its methods run on the nanny's event loop.
"""

from __future__ import annotations

from typing import Any

from distributed import Nanny
from distributed.diagnostics.plugin import NannyPlugin

from dask_pcm.config import Config
from dask_pcm.plugins.rebirth import rebirth
from dask_pcm.plugins.travel import Travels


class KeeperPlugin(Travels, NannyPlugin):
    """Allows a worker the memory that its contexts take, and has it back soon if it is killed."""

    name = "pcm-keeper"
    idempotent = True

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config.read()

    def setup(self, nanny: Nanny) -> None:
        self._nanny = nanny
        manager = nanny.memory_manager
        self._limit = manager.memory_limit if manager else None
        nanny.handlers["pcm_allow_memory"] = self.allow_memory
        rebirth().use(nanny, self.config.imports)

    def teardown(self, nanny: Any) -> None:
        nanny.handlers.pop("pcm_allow_memory", None)
        self.allow_memory(0)
        rebirth().leave(nanny)

    def allow_memory(self, n_bytes: int) -> None:
        """Kill the worker for so many bytes more than the user has set; see ``MemoryAllowance``."""
        if self._limit:
            self._nanny.memory_manager.memory_limit = self._limit + n_bytes
