"""Nannies start replacement workers from a fork server that has imported torch already.

By default, a nanny starts its worker as a new process, which imports everything anew: 4 to 20
seconds with torch and transformers. Python's fork server imports them once and forks each worker.

Dask looks up the start method each time that it starts a process. Here the answer depends on the
nanny: nannies with the toolkit use the fork server, unless
``distributed.worker.multiprocessing-method`` is set to something else than its default. All others
start their workers as before.

The server ends with the last of these nannies and the last worker that it has started.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
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
#: Variables that libraries read at their first use, not when they are imported.
_READ_LATE = frozenset({"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"})
_PRELOAD, _IMPORTS = "dask_pcm.plugins.nanny.preimport", "PCM_FORK_SERVER_IMPORTS"
#: Shortest and longest interval between checks whether the server still has children.
_MIN_WAIT_S, _MAX_WAIT_S = 0.1, 30.0
#: Whether the code in this context starts a worker for a nanny with the toolkit.
_is_forked: ContextVar[bool] = ContextVar("is_forked", default=False)


class ForkServer:
    """Tracks which nannies of this process use the fork server; for any thread."""

    def __init__(self) -> None:
        #: The environment that each nanny gave its workers before.
        self._nannies: dict[int, dict[str, str]] = {}
        #: The fork server's process, if it was started here.
        self._pid: int | None = None
        self._changing = threading.Lock()

    def use(self, nanny: Nanny, modules: Sequence[str]) -> None:
        """Start the next workers of `nanny` with `modules` imported, as far as these can be.

        Those workers get the environment variables of this moment: the server itself keeps the
        ones that it was started with.
        """
        with self._changing:
            if id(nanny) in self._nannies or not modules or _wants_its_own(nanny):
                return
            if dask.config.get(_METHOD) != _DEFAULT:
                return
            if not self._nannies:
                # A server that was there before belongs to the user's own code: never ended here.
                before = _server()._forkserver_pid
                pid = _begin(nanny, modules)
                self._pid = pid if pid != before or pid == self._pid else None
            self._nannies[id(nanny)] = nanny.env
            _set_env(nanny, {**os.environ, **nanny.env})
            nanny.instantiate = functools.partial(_instantiate, nanny)

    def release(self, nanny: Nanny) -> None:
        """Stop using the server for `nanny`; with the last nanny, end the server."""
        with self._changing:
            if id(nanny) in self._nannies:
                _set_env(nanny, self._nannies.pop(id(nanny)))
                del nanny.instantiate  # the class's own method is visible again
                if not self._nannies and self._pid is not None:
                    # In a thread: the nanny's worker may live on for long.
                    threading.Thread(target=self._end, args=(self._pid,), daemon=True).start()

    def _end(self, pid: int) -> None:
        """End the server once its last child has ended, unless it is used again."""
        wait_s = _MIN_WAIT_S
        # The server reports its children's exit codes: without it every nanny would see a crash.
        while not self._nannies and _has_children(pid):
            time.sleep(wait_s)
            wait_s = min(1.5 * wait_s, _MAX_WAIT_S)
        with self._changing:
            if self._nannies or not _let_go(pid):
                return
            self._pid = None
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _begin(nanny: Nanny, modules: Sequence[str]) -> int | None:
    """Start the server, if there is none, and replace Dask's lookup of the start method."""
    # As Dask does before it starts a worker: without PYTHONHASHSEED, hashes would differ.
    os.environ.update(nanny.pre_spawn_env)
    multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOAD])
    # The server reads it there. It stays: a thread of the user's that iterates over ``os.environ``
    # at that moment would fail at a variable that is deleted.
    os.environ[_IMPORTS] = ",".join(modules)
    with uninterrupted():
        forkserver.ensure_running()
    distributed.nanny.get_mp_context = distributed.process.get_mp_context = _mp_context
    pid: int | None = _server()._forkserver_pid
    return pid


def _server() -> Any:
    """Python's own handle of the server; the standard library has no public access to it."""
    return forkserver._forkserver


def _has_children(pid: int) -> bool:
    """Whether a process has children."""
    try:
        return bool(psutil.Process(pid).children())
    except psutil.Error:
        return False


def _let_go(pid: int) -> bool:
    """Close the pipe that keeps the server alive; False if another server runs by now.

    Python's own ``_stop`` also waits for the server to end, with a lock held that every start of a
    process needs.
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
    """Replaces Dask's own function where nannies look it up."""
    return multiprocessing.get_context("forkserver") if _is_forked.get() else get_mp_context()


async def _instantiate(nanny: Nanny) -> Any:
    """Start a nanny's worker from the fork server; replaces ``Nanny.instantiate``."""
    token = _is_forked.set(True)
    try:
        return await type(nanny).instantiate(nanny)
    finally:
        _is_forked.reset(token)


def _set_env(nanny: Nanny, env: dict[str, str]) -> None:
    """Set the environment of a nanny's next worker."""
    nanny.env = env
    if nanny.process is not None:  # a restart reads it from there
        nanny.process.env = env


def _wants_its_own(nanny: Nanny) -> bool:
    """Whether a nanny sets variables that a library may read when it is imported.

    In a forked worker these would come too late.
    """
    given = nanny.env.keys() - nanny.pre_spawn_env.keys()
    return any(os.environ.get(name) != nanny.env[name] for name in given - _READ_LATE)


@functools.cache
def fork_server() -> ForkServer:
    """The instance of this process."""
    return ForkServer()
