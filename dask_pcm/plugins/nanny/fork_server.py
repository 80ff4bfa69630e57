"""A fork server for nannies: a worker that was killed is back before it could import torch.

A nanny starts its worker as a new process, which imports everything anew: 4 to 20 seconds with
torch and transformers. Python's fork server imports them once and forks each worker from there.

Dask asks for one start method for all that a process starts, when it starts it. Here it is answered
for each nanny: those that have the toolkit start their workers from the fork server, unless Dask's
setting ``distributed.worker.multiprocessing-method`` says something else than its default, and all
others as ever.

The server ends when the last of these nannies has left, and the last worker that it has started.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing import forkserver, util
from typing import Any

import dask
import distributed.nanny
import distributed.process
import psutil
from distributed import Nanny
from distributed.utils import get_mp_context

from dask_pcm.plugins.interrupts import uninterrupted

_METHOD, _DEFAULT = "distributed.worker.multiprocessing-method", "spawn"
#: Variables that nothing which is imported looks at before a worker uses it.
_READ_LATE = frozenset({"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"})
_PRELOAD, _IMPORTS = "dask_pcm.plugins.nanny.preimport", "DASK_PCM__WORKER__IMPORTS"
#: How often it is looked whether the server has something left to do.
_MIN_WAIT_S, _MAX_WAIT_S = 0.1, 30.0
#: Whether what runs in this context starts a worker of a nanny that has the toolkit.
_is_forked: ContextVar[bool] = ContextVar("is_forked", default=False)


class Rebirth:
    """Which nannies of this process start their workers from the fork server."""

    def __init__(self) -> None:
        #: The environment that each was to give its workers.
        self._nannies: dict[int, dict[str, str]] = {}
        #: The fork server, if it was started here.
        self._pid: int | None = None
        self._changing = threading.Lock()

    def use(self, nanny: Nanny, modules: Sequence[str]) -> None:
        """Have the workers of `nanny` start with `modules` imported, where they can be.

        Environment variables are those of now: the server keeps the ones that it began with.
        """
        with self._changing:
            if id(nanny) in self._nannies or not modules or _wants_its_own(nanny):
                return
            if dask.config.get(_METHOD) != _DEFAULT:
                return
            if not self._nannies:
                before = _server()._forkserver_pid
                pid = _begin(nanny, modules)
                self._pid = pid if pid != before or pid == self._pid else None
            self._nannies[id(nanny)] = nanny.env
            _set_env(nanny, {**os.environ, **nanny.env})
            nanny.instantiate = functools.partial(_instantiate, nanny)

    def leave(self, nanny: Nanny) -> None:
        """The toolkit leaves this nanny, or it ends."""
        with self._changing:
            if id(nanny) in self._nannies:
                _set_env(nanny, self._nannies.pop(id(nanny)))
                del nanny.instantiate  # its class has one
                if not self._nannies and self._pid is not None:
                    # The worker of this nanny may live on, or is about to end.
                    threading.Thread(target=self._end, args=(self._pid,), daemon=True).start()

    def _end(self, pid: int) -> None:
        """End the server once all that it has started has ended, unless it is used again."""
        wait_s = _MIN_WAIT_S
        while not self._nannies and _has_children(pid):  # it has to tell how they end
            time.sleep(wait_s)
            wait_s = min(1.5 * wait_s, _MAX_WAIT_S)
        with self._changing:
            if self._nannies or not _let_go(pid):
                return
            self._pid = None
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _begin(nanny: Nanny, modules: Sequence[str]) -> int | None:
    """Start the server, if there is none; have Dask ask here how to start a process."""
    # What Dask sets before it starts a worker: else hashes would differ among workers.
    os.environ.update(nanny.pre_spawn_env)
    multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOAD])
    # How settings get there.
    with _environ(_IMPORTS, repr(list(modules))), uninterrupted():
        forkserver.ensure_running()
    distributed.nanny.get_mp_context = distributed.process.get_mp_context = _mp_context
    pid: int | None = _server()._forkserver_pid
    return pid


def _server() -> Any:
    """Python's side of the server, whose state has no public names."""
    return forkserver._forkserver


def _has_children(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).children())
    except psutil.Error:
        return False


def _let_go(pid: int) -> bool:
    """Have the server end, as soon as nobody holds on to it; False where it is another by now.

    Python's own ``_stop`` waits for that, and nobody could start a process meanwhile.
    """
    server = _server()
    with server._lock:
        if server._forkserver_pid != pid:
            return False
        os.close(server._forkserver_alive_fd)
        if not util.is_abstract_socket_namespace(server._forkserver_address):
            with suppress(FileNotFoundError):
                os.unlink(server._forkserver_address)
        server._forkserver_address = server._forkserver_alive_fd = None
        server._forkserver_pid = None
        if server._preload_modules == [_PRELOAD]:
            server.set_forkserver_preload(["__main__"])  # as it is by default
    return True


def _mp_context() -> Any:
    """Stands in for Dask's own function, where nannies look it up."""
    return multiprocessing.get_context("forkserver") if _is_forked.get() else get_mp_context()


async def _instantiate(nanny: Nanny) -> Any:
    token = _is_forked.set(True)
    try:
        return await type(nanny).instantiate(nanny)
    finally:
        _is_forked.reset(token)


def _set_env(nanny: Nanny, env: dict[str, str]) -> None:
    nanny.env = env
    if nanny.process is not None:  # what the next start of it goes by
        nanny.process.env = env


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
