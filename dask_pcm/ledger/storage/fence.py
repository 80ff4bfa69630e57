"""Fencing: how a run takes over an output, shows that it is alive, and is shut out; two ways.

Each storage has a fence of its own; ``fence_others`` and what else is written once stand below.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from dask_pcm.errors import OutputError
from dask_pcm.ledger.layout import HOME, JOURNAL, LOG
from dask_pcm.ledger.storage.base import Fence
from dask_pcm.ledger.storage.folder_files import NO_FOLDER, FolderFiles
from dask_pcm.ledger.storage.lock_files import SILENT_S
from dask_pcm.ledger.storage.lock_objects import LockObjects, age_s
from dask_pcm.ledger.storage.object_files import ObjectFiles
from dask_pcm.ledger.storage.tree import check_below

#: Of a run on another host, or without locks: with an older status it is not at work.
LOCKLESS_SILENT_S = 15.0


@dataclass(frozen=True, slots=True)
class LockFence(Fence):
    """A run at work holds a lock on a file in its folder; renaming the folder fences the run.

    The kernel gives the lock back when the process ends, however it ends. On another host, or
    where there are no locks, a run also counts as at work for as long as its ``status.json`` is
    written, by the filesystem's own clock.
    """

    files: FolderFiles

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        tree = self.files.tree
        try:
            os.makedirs(self.files.path, exist_ok=True)
            for folder in (LOG, JOURNAL):
                tree.make_folder(folder)
            lock = tree.open(f"{HOME}/lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            with contextlib.suppress(OSError):  # without locks the last one shuts the others out
                fcntl.flock(lock, fcntl.LOCK_EX)
            check_below(tree, HOME)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def open_run(self, says: Mapping[str, Any]) -> Iterator[None]:
        files, tree = self.files, self.files.tree
        begun = f"{HOME}/new-{files.run}"
        try:
            tree.make_folder(begun)
            with tree.creator(f"{begun}/driver.json") as file:
                file.write(json.dumps(says).encode())
            lock = tree.creator(f"{begun}/alive")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tree.rename(begun, files.run_dir)  # seen by others from now on, and with its lock
            try:
                yield
            finally:
                with contextlib.suppress(OSError, OutputError):
                    # By another name first: nothing may be written while it is being removed.
                    files.remove(self.fence_run(files.run))

    def is_alive(self, run: str, says: Mapping[str, Any] | None) -> bool:
        place, host = f"{HOME}/run-{run}", (says or {}).get("host")
        try:
            with self.files.tree.reader(f"{place}/alive") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except NO_FOLDER:
            return False
        except OSError:  # no locks here
            host = None
        # On some shared filesystems a lock holds on its own host only.
        return host != socket.gethostname() and self._is_fresh(f"{place}/status.json")

    def _is_fresh(self, name: str) -> bool:
        probe, tree = f"{HOME}/clock-{uuid.uuid4().hex}", self.files.tree
        try:
            with tree.creator(probe) as file:
                file.write(b"now")
            silent_s = tree.status(probe).st_mtime - tree.status(name).st_mtime
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                tree.remove(probe)
        return silent_s < LOCKLESS_SILENT_S

    def fence_run(self, run: str) -> str:
        renamed = f"{HOME}/old-{uuid.uuid4().hex}"
        with contextlib.suppress(*NO_FOLDER):
            self.files.tree.rename(f"{HOME}/run-{run}", renamed)
        return renamed

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"Cannot write to the output folder {self.files.path!r}: {error}.")


@dataclass(frozen=True, slots=True)
class StatusFence(Fence):
    """A run at work writes its ``status.json``; removing its ``driver.json`` fences the run."""

    files: ObjectFiles

    def takeover_lock(self) -> AbstractContextManager[None]:
        files = self.files
        return (
            files.lock_files.takeover_lock() if files.locks else LockObjects(files).takeover_lock()
        )

    @contextlib.contextmanager
    def open_run(self, says: Mapping[str, Any]) -> Iterator[None]:
        files = self.files
        files.write(f"{files.run_dir}/driver.json", json.dumps(dict(says), indent=1).encode())
        files.write(f"{files.run_dir}/status.json", b"{}")
        try:
            yield
        finally:
            files.remove(self.fence_run(files.run))

    def is_alive(self, run: str, says: Mapping[str, Any] | None) -> bool:
        status = f"{HOME}/run-{run}/status.json"
        return says is not None and age_s(self.files, status) < SILENT_S

    def fence_run(self, run: str) -> str:
        self.files.remove(f"{HOME}/run-{run}/driver.json")
        return f"{HOME}/run-{run}"
