"""An output in an object store, by any fsspec URL.

A part is put under its name only if there is none yet: by a conditional put, where the store has
it. Where it has not, whoever creates a lock file for the unit, in a folder that all workers share,
may put the part; a lock whose holder did not put anything for a while is taken over.

Nothing can be renamed in one step here. A run is shut out by removing its ``driver.json``, which
every unit looks for right before it puts its part. A part that was on its way at that moment may
still arrive; the run at work finds it before it ends, and removes it (see ``Driver``).

Nothing can be appended to either: finished rows are noted, as small objects, only of units that
have cost a process.

A run counts as at work for as long as its ``status.json`` is written, by the store's own clock.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import fsspec
import pyarrow as pa

from dask_pcm.errors import FencedError, OutputError, redacted, shown_cause
from dask_pcm.ledger.journal import Journal
from dask_pcm.ledger.lockfiles import LockFiles, refreshing
from dask_pcm.ledger.log import commit_line, encode_line
from dask_pcm.ledger.object_store import Store
from dask_pcm.ledger.output import HOME, JOURNAL, LOG, Entry, Output
from dask_pcm.ledger.parts import Note, write_part
from dask_pcm.ledger.status import Writer
from dask_pcm.ledger.tree import Tree

logger = logging.getLogger(__name__)

#: Protocols whose fsspec implementation puts conditionally; whether the store does is tried out.
_CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl"})
#: A name of an object is no longer than this in any store.
MAX_NAME_BYTES = 1024
#: A run whose status is older is not at work; a lock whose holder puts nothing is taken over.
SILENT_S = 30.0
_LOCK = re.compile(r"lock-\d{9}")
_POLL_S = 0.2
_N_READERS = 16


@dataclass(frozen=True, slots=True)
class Objects(Output):
    """An output in an object store.

    Attributes
    ----------
    locks
        Folder for lock files, on a filesystem that driver and workers share; None where the store
        puts conditionally.
    """

    poll_s: ClassVar[float] = 2.0
    heartbeat_s: ClassVar[float] = 5.0
    allows_late_commits: ClassVar[bool] = True
    locks: str | None = None

    @classmethod
    def at(cls, url: str, locks: str | None) -> Objects:
        """Find out whether the store puts conditionally, unless lock files are to be used.

        Raises
        ------
        OutputError
            Where it does not, and no folder for lock files is given; or it cannot be reached.
        """
        output = cls(url.rstrip("/"), uuid.uuid4().hex, locks and os.path.abspath(locks))
        try:
            if output.locks:
                Path(output.locks).mkdir(parents=True, exist_ok=True)
                output._put(f"{HOME}/probe-{output.run}", b"1")
                output.remove(f"{HOME}/probe-{output.run}")
                return output
            is_conditional = output._puts_conditionally()
        except OutputError:
            raise
        except Exception as error:  # each store has its own
            raise OutputError(
                f"Cannot write to the output {url!r}: {type(error).__name__}: {error}."
            ) from shown_cause(error)
        if not is_conditional:
            raise OutputError(
                f"The store of {url!r} cannot put an object only if there is none yet, so two"
                " workers could write one part. Give a folder for lock files that driver and"
                " workers share: lock_folder=..., --lock-folder."
            )
        return output

    @property
    def commit_method(self) -> str:
        return f"lock files in {self.locks}" if self.locks else "conditional put"

    def _puts_conditionally(self) -> bool:
        if self._protocol not in _CONDITIONAL:
            return False
        probe = f"{HOME}/probe-{self.run}"
        try:
            return self._create(probe, b"1") and not self._create(probe, b"2")
        finally:
            self.remove(probe)

    # -- files ------------------------------------------------------------------------------

    @property
    def _fs(self) -> Any:
        fs, _ = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        return Store(fs, self.path)

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def entries(self, folder: str = "") -> dict[str, Entry]:
        fs = self._fs
        root = fs._strip_protocol(self._at(folder)).rstrip("/")
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for info in fs.ls(root, detail=True, refresh=True):
                name = info["name"].rstrip("/")[len(root) + 1 :]
                if name and info["type"] == "directory":
                    found[f"{name}/"] = Entry(0, "")
                elif name:
                    found[name] = Entry(info["size"], _stamp(info))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        content: bytes = self._fs.cat_file(self._at(name))
        return content

    def write(self, name: str, data: bytes) -> None:
        if name != f"{self.run_dir}/driver.json":
            self._check_fence()
        self._put(name, data)

    def _put(self, name: str, data: bytes, **options: Any) -> None:
        self._make_folder(name)
        self._fs.pipe_file(self._at(name), data, **options)

    def _make_folder(self, name: str) -> None:
        if not self._is_flat:
            self._fs.makedirs(self._fs._parent(self._at(name)), exist_ok=True)

    @property
    def _is_flat(self) -> bool:
        """Whether names are mere names, as long as may be; elsewhere they are those of files."""
        return self._protocol in _CONDITIONAL | {"memory"}

    @property
    def _protocol(self) -> str:
        return self.path.partition("://")[0]

    def exists(self, name: str) -> bool:
        fs = self._fs
        fs.invalidate_cache()
        return bool(fs.exists(self._at(name)))

    def move(self, name: str, target: str) -> None:
        self._make_folder(target)
        self._fs.mv(self._at(name), self._at(target))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(name), recursive=True)

    def _create(self, name: str, data: bytes) -> bool:
        try:
            self._put(name, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                return False
            raise
        return True

    # -- runs -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        if self.locks:
            with self._lock_files.takeover_lock():
                yield
            return
        lock, mine = self._take_lock(), self.run.encode()
        try:
            with refreshing(lambda: self._put(lock, mine), SILENT_S):
                yield
        finally:
            self._put(lock, b"")

    def _take_lock(self) -> str:
        """Be the one that takes over: who creates the next of numbered objects.

        The last one says who holds the lock, until it is emptied or has not been written for a
        while. It is never removed, only followed: else one of two who find it old at the same
        moment could remove what the other has just created.
        """
        begun = time.monotonic()
        for attempt in itertools.count():
            if attempt and time.monotonic() - begun > SILENT_S:
                begun = time.monotonic()
                logger.warning("Waiting for another run that takes over %s", redacted(self.path))
            number, last = self._last_lock()
            lock = f"{HOME}/lock-{number + 1:09d}"
            if (last is None or self._is_free(last)) and self._create(lock, self.run.encode()):
                if self._last_lock()[1] == lock:  # else we had looked too long ago
                    for name in self._locks()[:-1]:
                        self.remove(f"{HOME}/{name}")
                    return lock
                self.remove(lock)
            time.sleep(_POLL_S)
        raise AssertionError  # it counts for ever

    def _is_free(self, lock: str) -> bool:
        try:
            return not self.read(lock) or self._age_s(lock) > SILENT_S
        except FileNotFoundError:  # somebody else was first
            return False

    def _last_lock(self) -> tuple[int, str | None]:
        names = self._locks()
        return (int(names[-1].partition("-")[2]), f"{HOME}/{names[-1]}") if names else (0, None)

    def _locks(self) -> list[str]:
        return [name for name in self.entries(HOME) if _LOCK.fullmatch(name)]

    @contextlib.contextmanager
    def open(self, says: Mapping[str, Any]) -> Iterator[None]:
        self.write_json(f"{self.run_dir}/driver.json", dict(says))
        self.write_json(f"{self.run_dir}/status.json", {})
        try:
            yield
        finally:
            self.remove(self.fence_run(self.run))

    def other_runs(self) -> list[Writer]:
        found = []
        for name in self.entries(HOME):
            if name.startswith("run-") and name.endswith("/") and name != f"run-{self.run}/":
                says = self.read_driver(name[len("run-") : -1])
                is_alive = says is not None and self._age_s(f"{HOME}/{name}status.json") < SILENT_S
                found.append(Writer(name[len("run-") : -1], says or {}, is_alive))
        return found

    def fence_run(self, run: str) -> str:
        self.remove(f"{HOME}/run-{run}/driver.json")
        return f"{HOME}/run-{run}"

    def _check_fence(self) -> None:
        if not self.exists(f"{self.run_dir}/driver.json"):
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one; what it was"
                " about to write was dropped."
            )

    def _age_s(self, name: str) -> float:
        """Seconds since an object was written, by the store's clock; infinity if there is none."""
        probe = f"{HOME}/clock-{self.run}"
        self._put(probe, b"now")
        try:
            now, then = (self._modified(each) for each in (probe, name))
        except FileNotFoundError:
            return float("inf")
        finally:
            self.remove(probe)
        return (now - then).total_seconds()

    def _modified(self, name: str) -> datetime:
        fs = self._fs
        fs.invalidate_cache()
        when: datetime = fs.modified(self._at(name))
        return when

    # -- parts ------------------------------------------------------------------------------

    def commit(
        self,
        name: str,
        tables: Iterable[pa.Table],
        note: Note,
        replaces: bool = False,
    ) -> bool:
        buffer = io.BytesIO()
        n_bytes, told = write_part(buffer, name, tables, note)
        data = buffer.getvalue()
        self.log(commit_line(self.run, name, n_bytes, told, ""))  # before it is there, see Folder
        if replaces:
            self._put(name, data)
        elif self.locks:
            if not self._put_locked(name, data):
                return False
        elif not self._create(name, data):
            if self._is_there(name):
                return False
            self._put(name, data)
        with contextlib.suppress(FencedError, OSError):  # it only saves reading it through
            stamp = _stamp(self._fs.info(self._at(name), refresh=True))
            self.log(commit_line(self.run, name, n_bytes, told, stamp))
        return True

    def _put_locked(self, name: str, data: bytes) -> bool:
        """Put a part under a lock file; False if it is there, or comes while we wait for it."""
        while not self._is_there(name):
            with self._lock_files.hold(name) as is_held:
                if is_held:
                    if self._is_there(name):  # put by whoever held the lock before us
                        return False
                    self._check_fence()
                    self._put(name, data)
                    return True
            time.sleep(_POLL_S)
        return False

    @property
    def _lock_files(self) -> LockFiles:
        return LockFiles(Tree(str(self.locks), owner=self.owner), self.path, SILENT_S)

    def _is_there(self, name: str) -> bool:
        """Whether a part is there that did not arrive from a run that was shut out."""
        return self.exists(name) and self.is_current(self.read_note(name))

    def open_part(self, name: str) -> AbstractContextManager[BinaryIO]:
        file: AbstractContextManager[BinaryIO] = self._fs.open(self._at(name), "rb")
        return file

    def log(self, line: Mapping[str, Any]) -> None:
        # Nothing can be appended to, and reading many small objects is slow: names hold the lines.
        self._check_fence()
        said, name = encode_line(line), f"{LOG}/{uuid.uuid4().hex[:12]}"
        telling = f"{name}.{base64.urlsafe_b64encode(said).decode()}"
        if self._is_flat and len(self._at(telling).encode()) <= MAX_NAME_BYTES:
            self._put(telling, b"-")
        else:
            self._put(name, said)

    def log_texts(self) -> Iterator[bytes]:
        def said(name: str) -> bytes:
            _, dot, text = name.partition(".")
            with contextlib.suppress(ValueError, FileNotFoundError, IsADirectoryError):  # not ours
                return base64.urlsafe_b64decode(text) if dot else self.read(f"{LOG}/{name}")
            return b""

        with ThreadPoolExecutor(_N_READERS) as pool:
            yield from pool.map(said, self.entries(LOG))

    def begin_journal(self, unit: str, origin: Mapping[str, Any]) -> Journal:
        place = f"{JOURNAL}/{unit}.{self.run}.{uuid.uuid4().hex}"
        about = {**origin, "run": self.run, "begun": self.generation, "unit": unit}
        return _ObjectJournal(self.write, place, about)

    def read_journal(self, name: str) -> bytes:
        return b"".join(self.read(f"{name}/{number}") for number in self.entries(name))


class _ObjectJournal(Journal):
    """A journal as numbered objects: nothing can be appended to one."""

    def __init__(
        self, put: Callable[[str, bytes], None], name: str, about: Mapping[str, Any]
    ) -> None:
        self._put = put
        self._numbers = itertools.count()
        super().__init__(name, about)

    def _write(self, blocks: Sequence[bytes | memoryview]) -> None:
        self._put(f"{self.name}/{next(self._numbers):09d}", b"".join(blocks))

    def close(self) -> None:
        """All of it is there."""


def _stamp(info: Mapping[str, Any]) -> str:
    """A sign that changes when an object is written again."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created"):
        if info.get(key):
            return str(info[key])
    return ""
