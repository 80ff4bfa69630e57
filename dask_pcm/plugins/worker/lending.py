"""A worker lends memory to the other workers of its host, and borrows theirs."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from distributed import Worker

from dask_pcm.config import Config
from dask_pcm.ladder.device import declared_device
from dask_pcm.ladder.lending import Informer
from dask_pcm.ladder.store import Store
from dask_pcm.plugins.worker.memory import MemoryAllowance

logger = logging.getLogger(__name__)

#: How often it is looked whether requests wait, in seconds.
_LOOK_S = 0.25
#: What is left of a device's memory beside what is lent, as a share of all.
_LEFT_SHARE = 1 / 16
#: A need is told once it is as much larger than what was told, and than nothing.
_MORE, _LEAST_BYTES = 1.25, 1 << 20
_CPU = "cpu"
_LOANS = "borrowed memory"


class WorkerLending:
    """Opens the store's lending to the workers of a cluster, and says when the worker lends.

    Parameters
    ----------
    memory
        Raises the worker's memory limits by what it borrows.
    tell
        Sends a message to the scheduler; may be called from any thread.
    """

    def __init__(
        self,
        worker: Worker,
        config: Config,
        store: Store,
        memory: MemoryAllowance,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config = config
        self._store = store
        self._informer = Informer()
        self._tell = tell
        #: By context, what the gate knows of its needs, in bytes.
        self._told: dict[str, int] = {}
        self._is_over = threading.Event()
        self._lending = store.lend(
            self._device,
            self._devices,
            self._is_free,
            lambda n_bytes: memory.set_taken(_LOANS, n_bytes),
        )
        self._name = worker.address
        threading.Thread(target=self._look, name="pcm-informer", daemon=True).start()

    def open(self, cluster: str) -> None:
        """Lend to the workers of a cluster on this host, and borrow from them; on the event loop.

        The gate may be a new one, which knows of no needs.
        """
        self._told.clear()
        # Another thread: an earlier server ends first, which asks the nanny.
        open_ = threading.Thread(target=self._lending.open, args=(cluster, self._name), daemon=True)
        open_.start()

    def close(self) -> None:
        """Lend nothing more; the store closes the rest."""
        self._is_over.set()

    def _look(self) -> None:
        """Decide now and then whether to offer memory."""
        while not self._is_over.wait(_LOOK_S):
            try:
                self._look_once()
            except Exception:
                logger.exception("It was not decided whether memory is lent")

    def _look_once(self) -> None:
        leases = self._lending.leases
        was_offering = leases.is_offering
        leases.is_offering = self._informer.decide(self._store.n_waiting(), time.monotonic())
        if was_offering and not leases.is_offering:
            leases.reclaim(with_own=False)
        self._tell_needs()

    def _tell_needs(self) -> None:
        """Tell the gate which contexts need more memory than their device has."""
        for digest, n_bytes in self._store.needed_bytes().items():
            if n_bytes > _MORE * self._told.get(digest, 0) + _LEAST_BYTES:
                self._told[digest] = n_bytes
                self._tell({"op": "pcm-needs", "digest": digest, "n_bytes": n_bytes})

    def _device(self) -> str | None:
        """The device of this worker that can be lent."""
        return next(iter(self._devices()), None) if self._config.n_devices == 1 else None

    def _devices(self) -> Mapping[str, str]:
        """Devices on which this process can take memory, its own first."""
        if self._config.is_cpu_only or declared_device() is None:
            # With a budget, the host's memory plays the device's part.
            return {} if self._config.device_budget_bytes is None else {_CPU: _CPU}
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return {}
        own = torch.cuda.current_device()
        numbers = sorted(range(torch.cuda.device_count()), key=lambda k: k != own)
        return {_uuid(k): f"cuda:{k}" for k in numbers}

    def _is_free(self, n_bytes: int) -> bool:
        """Whether this worker's device has memory that is not even cached."""
        if self._device() == _CPU:
            return True
        import torch

        free, total = torch.cuda.mem_get_info()
        return bool(free - n_bytes > _LEFT_SHARE * total)


def _uuid(device: int) -> str:
    import torch

    return f"cuda:{torch.cuda.get_device_properties(device).uuid}"
