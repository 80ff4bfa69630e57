"""An output in a folder of a filesystem that driver and workers share.

A part is written below the run's folder, synced, and then linked to its name: ``link(2)`` refuses
to replace a file. Whoever shuts a run out renames its folder, and every later link of it fails.

Where the filesystem has no hard links, a part is renamed to its name unless that is there. Two
attempts at one unit can then both write, one after the other; what stands there is always one
whole part of that unit.

A run at work holds a lock on a file in its folder, which the kernel gives back when its process
ends, however it ends. On another host, or where there are no locks, it also counts as at work for
as long as its ``status.json`` is written, by the filesystem's own clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from dask_pcm.errors import FencedError, OutputError
from dask_pcm.ledger.journal import NO_ROOM, FileJournal
from dask_pcm.ledger.log import commit_line, encode_line
from dask_pcm.ledger.output import HOME, JOURNAL, LOG, Entry, Output
from dask_pcm.ledger.parts import Note, write_part
from dask_pcm.ledger.status import Writer
from dask_pcm.ledger.tree import Tree

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_FOLDER = (FileNotFoundError, NotADirectoryError)
#: Of the name of a file, in that of its temporary one.
_MAX_STEM = 100
#: Of a run on another host, or without locks: with an older status it is not at work.
SILENT_S = 15.0


@dataclass(frozen=True, slots=True)
class Folder(Output):
    """An output in a folder.

    Attributes
    ----------
    is_guarded
        Whether folders of others are refused below ``_pcm``; see ``Tree``.
    """

    has_journals = True
    is_guarded: bool = field(default=True, kw_only=True)

    @property
    def commit_method(self) -> str:
        return "hard links" if self._has_links() else "renaming (there are no hard links here)"

    @property
    def _tree(self) -> Tree:
        return Tree(self.path, self.is_guarded, self.owner)

    # -- files ------------------------------------------------------------------------------

    def entries(self, folder: str = "") -> dict[str, Entry]:
        found = {}
        with contextlib.suppress(*_NO_FOLDER):
            for name, status in self._tree.entries(folder):
                shown = f"{name}/" if stat.S_ISDIR(status.st_mode) else name
                found[shown] = Entry(status.st_size, str(status.st_mtime_ns))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        with self._tree.reader(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        temporary, tree = self._temporary(os.path.basename(name)), self._tree
        with self._fenced(temporary):
            with tree.creator(temporary) as file:
                file.write(data)
                _sync(file)
            tree.rename(temporary, name)
            tree.sync_folder(os.path.dirname(name))

    def exists(self, name: str) -> bool:
        return self._tree.exists(name)

    def move(self, name: str, target: str) -> None:
        self._tree.make_folder(os.path.dirname(target))
        self._tree.rename(name, target)

    def remove(self, name: str) -> None:
        self._tree.remove(name)

    # -- runs -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        try:
            os.makedirs(self.path, exist_ok=True)
            for folder in (LOG, JOURNAL):
                self._tree.make_folder(folder)
            lock = self._tree.open(f"{HOME}/lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            with contextlib.suppress(OSError):  # without locks the last one shuts the others out
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._tree.check(HOME)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def open(self, says: Mapping[str, Any]) -> Iterator[None]:
        begun, tree = f"{HOME}/new-{self.run}", self._tree
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
            tree.rename(begun, self.run_dir)  # seen by others from now on, and with its lock
            try:
                yield
            finally:
                with contextlib.suppress(OSError, OutputError):
                    # By another name first: nothing may be written while it is being removed.
                    self.remove(self.fence_run(self.run))

    def other_runs(self) -> list[Writer]:
        found = []
        for name in self.entries(HOME):
            if name.startswith("run-") and name.endswith("/") and name != f"run-{self.run}/":
                run = name[len("run-") : -1]
                says = self.read_driver(run) or {}
                is_alive = self._is_alive(f"{HOME}/{name[:-1]}", says.get("host"))
                found.append(Writer(run, says, is_alive))
        return found

    def _is_alive(self, place: str, host: Any) -> bool:
        try:
            with self._tree.reader(f"{place}/alive") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except _NO_FOLDER:
            return False
        except OSError:  # no locks here
            host = None
        # On some shared filesystems a lock holds on its own host only.
        return host != socket.gethostname() and self._is_fresh(f"{place}/status.json")

    def _is_fresh(self, name: str) -> bool:
        probe, tree = f"{HOME}/clock-{uuid.uuid4().hex}", self._tree
        try:
            with tree.creator(probe) as file:
                file.write(b"now")
            age_s = tree.status(probe).st_mtime - tree.status(name).st_mtime
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                tree.remove(probe)
        return age_s < SILENT_S

    def fence_run(self, run: str) -> str:
        renamed = f"{HOME}/old-{uuid.uuid4().hex}"
        with contextlib.suppress(*_NO_FOLDER):
            self._tree.rename(f"{HOME}/run-{run}", renamed)
        return renamed

    # -- parts ------------------------------------------------------------------------------

    def commit(
        self,
        name: str,
        tables: Iterable[pa.Table],
        note: Note,
        replaces: bool = False,
    ) -> bool:
        temporary, tree = self._temporary(name), self._tree
        try:
            with self._fenced(temporary), tree.creator(temporary) as file:
                n_bytes, told = write_part(file, name, tables, note)
                _sync(file)
                stamp = str(os.fstat(file.fileno()).st_mtime_ns)
            # Before it is there, and synced as it is: else many would have to be read through.
            self._log(commit_line(self.run, name, n_bytes, told, stamp), is_synced=True)
            with self._fenced(temporary):
                if replaces:
                    tree.rename(temporary, name)
                elif not _link(tree, temporary, name):
                    return False
        finally:
            tree.remove(temporary)
        tree.sync_folder()
        return True

    def open_part(self, name: str) -> AbstractContextManager[BinaryIO]:
        return self._tree.reader(name)

    def log(self, line: Mapping[str, Any]) -> None:
        self._log(line)

    def _log(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        name = f"{LOG}/{self.run}.{socket.gethostname()}.{os.getpid()}.jsonl"
        with self._fenced():
            self._tree.status(self.run_dir)  # a run that was replaced notes nothing any more
            try:
                descriptor = self._tree.open(name, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                descriptor = self._create(name, os.O_RDWR | os.O_APPEND)
            try:
                _append_line(descriptor, encode_line(line))
                if is_synced:
                    os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def log_texts(self) -> Iterator[bytes]:
        for name in self.entries(LOG):
            if not name.endswith("/"):  # a folder is none of ours
                yield from filter(None, self.read(f"{LOG}/{name}").splitlines())

    def begin_journal(self, unit: str, origin: Mapping[str, Any]) -> FileJournal:
        name = f"{JOURNAL}/{unit}.{self.run}.{uuid.uuid4().hex}"
        with self._fenced():
            descriptor = self._create(name, os.O_WRONLY | os.O_APPEND)
        about = {**origin, "run": self.run, "begun": self.generation, "unit": unit}
        return FileJournal(descriptor, name, about)

    def read_journal(self, name: str) -> bytes:
        return self.read(name)

    def _create(self, name: str, flags: int) -> int:
        """A file that is there from now on, unless the run was replaced; open.

        Made in the run's folder, and linked from there as a part is: however long any of these
        calls takes, none makes a file once the run is shut out.
        """
        temporary, tree = self._temporary(os.path.basename(name)), self._tree
        try:
            tree.creator(temporary).close()
            _link(tree, temporary, name)  # another thread may have been first
        finally:
            tree.remove(temporary)
        tree.sync_folder(os.path.dirname(name))
        return tree.open(name, flags)

    # -- helpers ----------------------------------------------------------------------------

    def _temporary(self, name: str) -> str:
        own = f"{name[:_MAX_STEM]}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        return f"{self.run_dir}/{own}"

    @contextlib.contextmanager
    def _fenced(self, temporary: str | None = None) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one, or its folder"
                " was removed; what it was about to write was dropped."
            ) from error
        except OSError as error:
            if temporary is not None:
                self._tree.remove(temporary)
            if error.errno in NO_ROOM:
                raise OutputError(
                    f"There is no room left for the output {self.path!r}: {error}. Make room, and"
                    " run the same again to go on."
                ) from error
            raise

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"Cannot write to the output folder {self.path!r}: {error}.")

    def _has_links(self) -> bool:
        source, target = self._temporary("probe"), self._temporary("probe")
        try:
            self._tree.creator(source).close()
            self._tree.link(source, target)
        except OSError as error:
            return error.errno not in _NO_LINKS
        finally:
            self._tree.remove(source)
            self._tree.remove(target)
        return True


def _link(tree: Tree, temporary: str, final: str) -> bool:
    try:
        tree.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if tree.exists(final):
            return False
        tree.rename(temporary, final)
    return True


def _append_line(descriptor: int, data: bytes) -> None:
    """Append a line in one write, if there is room for all of it."""
    n_bytes = os.fstat(descriptor).st_size
    if n_bytes and os.pread(descriptor, 1, n_bytes - 1) != b"\n":  # the line before was torn
        data = b"\n" + data
    while data:  # what is written in part is followed by the rest, or by an error that says why
        data = data[os.write(descriptor, data) :]


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
