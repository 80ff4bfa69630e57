"""Fencing: how a run takes over an output, shows that it is alive, and is fenced; two ways.

What both have in common is in ``takeover.py``.
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

#: A run on another host, or on a filesystem without locks, counts as dead once its status is
#: older than this.
LOCKLESS_SILENT_S = 15.0


@dataclass(frozen=True, slots=True)
class LockFence(Fence):
    """A live run holds a lock on a file in its run directory; renaming the directory fences it.

    The kernel releases the lock when the process ends, in any way. A lock may not be visible
    on other hosts, and some filesystems have none. There a run also counts as alive while its
    ``status.json`` is being written, by the filesystem's own clock.
    """

    files: FolderFiles

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        """Hold a ``flock`` on ``_pcm/lock``; make the folders and check what is in them."""
        tree = self.files.tree
        try:
            os.makedirs(self.files.path, exist_ok=True)
            for folder in (LOG, JOURNAL):
                tree.make_folder(folder)
            lock = tree.open(f"{HOME}/lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            # Without locks, takeovers at the same time fence each other, and the last one stays.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            check_below(tree, HOME)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def open_run(self, says: Mapping[str, Any]) -> Iterator[None]:
        """Make the run directory with a locked file; on exit, rename and remove it."""
        files, tree = self.files, self.files.tree
        unpublished = f"{HOME}/new-{files.run}"
        try:
            tree.make_folder(unpublished)
            with tree.creator(f"{unpublished}/driver.json") as file:
                file.write(json.dumps(says).encode())
            lock = tree.creator(f"{unpublished}/alive")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Locked before it gets its name: a run directory without a lock would look like that
            # of a dead run, and others would remove it.
            tree.rename(unpublished, files.run_dir)
            try:
                yield
            finally:
                with contextlib.suppress(OSError, OutputError):
                    # Fenced before it is removed: units that still run must not write into a
                    # directory while it is being removed.
                    files.remove(self.fence_run(files.run))

    def is_alive(self, run: str, says: Mapping[str, Any] | None) -> bool:
        """Whether the run's file is locked, or its status is fresh where locks are not seen."""
        run_dir, host = f"{HOME}/run-{run}", (says or {}).get("host")
        try:
            with self.files.tree.reader(f"{run_dir}/alive") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except NO_FOLDER:
            return False
        except OSError:
            # The filesystem has no locks, so the host proves nothing.
            host = None
        # On some shared filesystems a lock is visible on its own host only. So a free lock proves
        # the run dead only if it ran on this host.
        return host != socket.gethostname() and self._is_fresh(f"{run_dir}/status.json")

    def _is_fresh(self, name: str) -> bool:
        # Both times come from the filesystem's clock; clocks of hosts may differ.
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
        """Rename the run directory."""
        # A rename is atomic: each write of the run either happened before it, or fails.
        renamed = f"{HOME}/old-{uuid.uuid4().hex}"
        with contextlib.suppress(*NO_FOLDER):
            self.files.tree.rename(f"{HOME}/run-{run}", renamed)
        return renamed

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"Cannot write to the output folder {self.files.path!r}: {error}.")


@dataclass(frozen=True, slots=True)
class StatusFence(Fence):
    """A live run keeps writing its ``status.json``; removing its ``driver.json`` fences it."""

    files: ObjectFiles

    def takeover_lock(self) -> AbstractContextManager[None]:
        """Hold the lock file if the output has lock files, else the numbered object."""
        files = self.files
        return (
            files.lock_files.takeover_lock() if files.locks else LockObjects(files).takeover_lock()
        )

    @contextlib.contextmanager
    def open_run(self, says: Mapping[str, Any]) -> Iterator[None]:
        """Put ``driver.json`` and an empty status; on exit, remove them, the former first."""
        # `driver.json` first: without it the write of the status would find the run fenced.
        files = self.files
        files.write(f"{files.run_dir}/driver.json", json.dumps(dict(says), indent=1).encode())
        files.write(f"{files.run_dir}/status.json", b"{}")
        try:
            yield
        finally:
            files.remove(self.fence_run(files.run))

    def is_alive(self, run: str, says: Mapping[str, Any] | None) -> bool:
        """Whether the run has a driver and a fresh status."""
        status = f"{HOME}/run-{run}/status.json"
        return says is not None and age_s(self.files, status) < SILENT_S

    def fence_run(self, run: str) -> str:
        """Remove the run's ``driver.json``."""
        # The directory keeps its name, as moving objects one by one would not be atomic.
        self.files.remove(f"{HOME}/run-{run}/driver.json")
        return f"{HOME}/run-{run}"
