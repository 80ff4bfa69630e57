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
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from dask_pcm.errors import FencedError, OutputError
from dask_pcm.ledger.journal import FileJournal
from dask_pcm.ledger.log import commit_line, encode_line
from dask_pcm.ledger.output import HOME, JOURNAL, LOG, Entry, Output, Owner
from dask_pcm.ledger.parts import Note, write_part

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_FOLDER = (FileNotFoundError, NotADirectoryError)
#: Of a run on another host, or without locks: with an older status it is not at work.
SILENT_S = 15.0


@dataclass(frozen=True, slots=True)
class Folder(Output):
    """An output in a folder."""

    has_journals = True

    @property
    def how(self) -> str:
        return "hard links" if self._has_links() else "renaming (there are no hard links here)"

    # -- files ------------------------------------------------------------------------------

    def _at(self, name: str) -> Path:
        return Path(self.path, name)

    def entries(self, folder: str = "") -> dict[str, Entry]:
        found = {}
        with contextlib.suppress(*_NO_FOLDER), os.scandir(self._at(folder)) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    status = entry.stat()
                    name = f"{entry.name}/" if entry.is_dir() else entry.name
                    found[name] = Entry(status.st_size, str(status.st_mtime_ns))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        return self._at(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        temporary = self._temporary(os.path.basename(name))
        with self._fenced(temporary), temporary.open("xb") as file:
            file.write(data)
            _sync(file)
        with self._fenced(temporary):
            temporary.replace(self._at(name))
        _sync_folder(self._at(name).parent)

    def exists(self, name: str) -> bool:
        return self._at(name).exists()

    def move(self, name: str, target: str) -> None:
        self._at(target).parent.mkdir(parents=True, exist_ok=True)
        self._at(name).rename(self._at(target))

    def remove(self, name: str) -> None:
        path = self._at(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    # -- runs -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def taking_over(self) -> Iterator[None]:
        try:
            self._at(LOG).mkdir(parents=True, exist_ok=True)
            lock = self._at(f"{HOME}/lock").open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            with contextlib.suppress(OSError):  # without locks the last one shuts the others out
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def open(self, says: Mapping[str, Any]) -> Iterator[None]:
        begun = self._at(f"{HOME}/new-{self.run}")
        try:
            begun.mkdir(parents=True)
            (begun / "driver.json").write_text(json.dumps(says))
            lock = (begun / "alive").open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begun.rename(self._at(self.place))  # seen by others from now on, and with its lock
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    # By another name first: nothing may be written while it is being removed.
                    self.remove(self.shut_out(self.run))

    def others(self) -> list[Owner]:
        found = []
        for name in self.entries(HOME):
            if name.startswith("run-") and name != f"run-{self.run}/":
                run = name[len("run-") : -1]
                says = self.read_driver(run) or {}
                is_alive = self._is_alive(f"{HOME}/{name[:-1]}", says.get("host"))
                found.append(Owner(run, says, is_alive))
        return found

    def _is_alive(self, place: str, host: str | None) -> bool:
        try:
            with self._at(f"{place}/alive").open("r") as lock:
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
        probe = self._at(f"{HOME}/clock-{uuid.uuid4().hex}")
        try:
            probe.write_bytes(b"now")
            age_s = probe.stat().st_mtime - self._at(name).stat().st_mtime
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        return age_s < SILENT_S

    def shut_out(self, run: str) -> str:
        renamed = f"{HOME}/old-{uuid.uuid4().hex}"
        with contextlib.suppress(*_NO_FOLDER):
            self._at(f"{HOME}/run-{run}").rename(self._at(renamed))
        return renamed

    # -- parts ------------------------------------------------------------------------------

    def commit(
        self,
        name: str,
        tables: Iterable[pa.Table],
        note: Note,
        replaces: bool = False,
    ) -> bool:
        temporary = self._temporary(name)
        try:
            with self._fenced(temporary), temporary.open("xb") as file:
                n_bytes, told = write_part(file, name, tables, note)
                _sync(file)
                stamp = str(os.fstat(file.fileno()).st_mtime_ns)
            # Before it is there, and synced as it is: else many would have to be read through.
            self._log(commit_line(self.run, name, n_bytes, told, stamp), is_synced=True)
            with self._fenced(temporary):
                if replaces:
                    temporary.replace(self._at(name))
                elif not _link(temporary, self._at(name)):
                    return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.path)
        return True

    def open_part(self, name: str) -> AbstractContextManager[BinaryIO]:
        return self._at(name).open("rb")

    def log(self, line: Mapping[str, Any]) -> None:
        self._log(line)

    def _log(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        name = f"{self.run}.{socket.gethostname()}.{os.getpid()}.jsonl"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        with self._fenced():
            os.stat(self._at(self.place))  # a run that was replaced notes nothing any more
            descriptor = os.open(self._at(f"{LOG}/{name}"), flags, 0o666)
        try:
            with self._fenced():
                _append_line(descriptor, encode_line(line))
                if is_synced:
                    os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def log_texts(self) -> Iterator[bytes]:
        for name in self.entries(LOG):
            yield from filter(None, self.read(f"{LOG}/{name}").splitlines())

    def begin_journal(self, unit: str, origin: Mapping[str, Any]) -> FileJournal:
        name = f"{unit}.{self.run}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        with self._fenced():
            os.stat(self._at(self.place))
            self._at(JOURNAL).mkdir(exist_ok=True)
            descriptor = os.open(self._at(f"{JOURNAL}/{name}"), flags, 0o666)
        about = {**origin, "run": self.run, "begun": self.begun, "unit": unit}
        return FileJournal(descriptor, f"{JOURNAL}/{name}", about)

    def read_journal(self, name: str) -> bytes:
        return self.read(name)

    # -- helpers ----------------------------------------------------------------------------

    def _temporary(self, name: str) -> Path:
        own = f"{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        return self._at(f"{self.place}/{own}")

    @contextlib.contextmanager
    def _fenced(self, temporary: Path | None = None) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one, or its folder"
                " was removed; what it was about to write was dropped."
            ) from error
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            if error.errno in _NO_ROOM:
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
            source.write_bytes(b"")
            os.link(source, target)
        except OSError as error:
            return error.errno not in _NO_LINKS
        finally:
            source.unlink(missing_ok=True)
            target.unlink(missing_ok=True)
        return True


def _link(temporary: Path, final: Path) -> bool:
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if final.exists():
            return False
        temporary.replace(final)
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


def _sync_folder(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
