"""A fork server for nannies: a worker that was killed is back before it could import torch.

A nanny starts its worker as a new process, which imports everything anew: 4 to 20 seconds with
torch and transformers. Python's fork server imports them once and forks each worker from there.

For as long as a nanny of this process has the toolkit, Dask's setting
``distributed.worker.multiprocessing-method`` is "forkserver" in it, unless it has been set to
something else than Dask's default.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing import forkserver

import dask
from distributed import Nanny
from distributed.utils import get_mp_context

_METHOD, _DEFAULT = "distributed.worker.multiprocessing-method", "spawn"
_PRELOAD, _IMPORTS = "dask_pcm.plugins.preimport", "DASK_PCM__WORKER__IMPORTS"


class Rebirth:
    """Which nannies of this process start their workers from the fork server."""

    def __init__(self) -> None:
        self._nannies: set[int] = set()
        self._changing = threading.Lock()

    def use(self, nanny: Nanny, modules: Sequence[str]) -> None:
        """Have the workers of `nanny` start with `modules` imported, where they can be.

        Environment variables are those of now: the server keeps the ones that it began with.
        """
        with self._changing:
            if id(nanny) in self._nannies or not modules:
                return
            if not self._nannies:
                if dask.config.get(_METHOD) != _DEFAULT:
                    return
                # What Dask sets before it starts a worker: else hashes would differ among workers.
                os.environ.update(nanny.pre_spawn_env)
                dask.config.set({_METHOD: "forkserver"})
                get_mp_context()  # Dask sets its own list when it is first called, and never again
                multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOAD])
                os.environ[_IMPORTS] = repr(list(modules))  # how settings get there
                forkserver.ensure_running()
                del os.environ[_IMPORTS]
            self._nannies.add(id(nanny))
            nanny.env = {**os.environ, **nanny.env}
            if nanny.process is not None:  # what the next start of it goes by
                nanny.process.env = nanny.env

    def leave(self, nanny: Nanny) -> None:
        """The toolkit leaves this nanny, or it ends."""
        with self._changing:
            if id(nanny) in self._nannies:
                self._nannies.discard(id(nanny))
                if not self._nannies:
                    dask.config.set({_METHOD: _DEFAULT})


@functools.cache
def rebirth() -> Rebirth:
    """That of this process."""
    return Rebirth()
