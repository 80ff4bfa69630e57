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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver

import dask
from distributed import Nanny
from distributed.utils import get_mp_context

_METHOD, _DEFAULT = "distributed.worker.multiprocessing-method", "spawn"
#: Variables that nothing which is imported looks at before a worker uses it.
_READ_LATE = frozenset({"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"})
_PRELOAD, _IMPORTS = "dask_pcm.plugins.preimport", "DASK_PCM__WORKER__IMPORTS"


class Rebirth:
    """Which nannies of this process start their workers from the fork server."""

    def __init__(self) -> None:
        #: The environment that each was to give its workers.
        self._nannies: dict[int, dict[str, str]] = {}
        self._changing = threading.Lock()

    def use(self, nanny: Nanny, modules: Sequence[str]) -> None:
        """Have the workers of `nanny` start with `modules` imported, where they can be.

        Environment variables are those of now: the server keeps the ones that it began with.
        """
        with self._changing:
            if id(nanny) in self._nannies or not modules or _wants_its_own(nanny):
                return
            if not self._nannies:
                if dask.config.get(_METHOD) != _DEFAULT:
                    return
                # What Dask sets before it starts a worker: else hashes would differ among workers.
                os.environ.update(nanny.pre_spawn_env)
                dask.config.set({_METHOD: "forkserver"})
                get_mp_context()  # Dask sets its own list when it is first called, and never again
                multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOAD])
                with _environ(_IMPORTS, repr(list(modules))):  # how settings get there
                    forkserver.ensure_running()
            self._nannies[id(nanny)] = nanny.env
            nanny.env = {**os.environ, **nanny.env}
            if nanny.process is not None:  # what the next start of it goes by
                nanny.process.env = nanny.env

    def leave(self, nanny: Nanny) -> None:
        """The toolkit leaves this nanny, or it ends."""
        with self._changing:
            if id(nanny) in self._nannies:
                nanny.env = self._nannies.pop(id(nanny))
                if nanny.process is not None:
                    nanny.process.env = nanny.env
                if not self._nannies:
                    dask.config.set({_METHOD: _DEFAULT})


def _wants_its_own(nanny: Nanny) -> bool:
    """Whether its workers are to have variables that may be read when something is imported."""
    given = nanny.env.keys() - nanny.pre_spawn_env.keys()
    return any(os.environ.get(name) != nanny.env[name] for name in given - _READ_LATE)


@contextmanager
def _environ(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@functools.cache
def rebirth() -> Rebirth:
    """That of this process."""
    return Rebirth()
