"""Parts of an output, each committed once: the first writer wins.

``OUTPUT/part-<first row>-<end row>.parquet`` holds the rows of the input from the first to the
one before the end, counted over the whole input, so that names sort in input order and units of
another size in another run fit between. Everything else lies under ``OUTPUT/_pcm/``:

``manifest.json``
    Which job this is; see ``manifest.py``.
``run-<id>/``
    Temporary files of the run at work. A part is written there, synced, and then linked to its
    name: ``link(2)`` refuses to replace a file. Whoever takes over renames the folder first, and
    every later link of the old run fails: it is fenced off.
``started/``
    A line for each unit that was started, by process.
``report.json``
    The report of the last run.
``lock``
    Held while a run looks whether it may begin, and takes over.

Where the filesystem has no hard links, a part is renamed to its name unless that is there. Two
attempts at one unit can then both write, one after the other; what stands there is always one
whole part of that unit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.errors import FencedError, OutputError

METADATA_KEY = b"dask_pcm"
_PART = re.compile(r"part-(\d{12,})-(\d{12,})\.parquet|part-p(\d{8,})\.parquet")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def range_name(start: int, stop: int) -> str:
    """Name of the part for rows `start` to `stop` of the input."""
    return f"part-{start:012d}-{stop:012d}.parquet"


def partition_name(partition: int) -> str:
    """Name of the part for a whole partition of a frame whose rows nobody has counted."""
    return f"part-p{partition:08d}.parquet"


def parse_name(name: str) -> tuple[int, int] | int | None:
    """The row range or the partition in a part's name; None for any other name."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    start, stop, partition = match.groups()
    return int(partition) if partition else (int(start), int(stop))


@dataclass(frozen=True, slots=True)
class Output:
    """An output folder as one run sees it; travels to the workers.

    Attributes
    ----------
    path
        Absolute path that driver and workers see.
    run
        Identity of the run, new for each.
    """

    path: str
    run: str

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Output:
        text = os.fspath(path).removeprefix("file://")
        if "://" in text:
            raise OutputError(
                f"{text!r} is a URL; outputs go to a folder on a filesystem that driver and workers"
                " share."
            )
        return cls(os.path.abspath(os.path.expanduser(text)), uuid.uuid4().hex)

    @property
    def home(self) -> Path:
        return Path(self.path, "_pcm")

    @property
    def temporary(self) -> Path:
        return self.home / f"run-{self.run}"

    def open(self) -> None:
        """Make the folders of this run.

        Raises
        ------
        OutputError
            Where they cannot be written.
        """
        try:
            self.temporary.mkdir(parents=True, exist_ok=True)
            (self.home / "started").mkdir(exist_ok=True)
            probe = self.temporary / "probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"Cannot write to the output folder {self.path!r}: {error}."
            ) from error

    def fence(self) -> None:
        """Shut out every other run: none of them can commit once this returns."""
        for folder in self.home.glob("run-*"):
            if folder != self.temporary:
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(self.home / f"old-{uuid.uuid4().hex}")
        for folder in self.home.glob("old-*"):
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def taking_over(self) -> Iterator[None]:
        """Of several runs that begin at once, one at a time looks and takes over.

        Where the filesystem has no locks they may come at once; then the last one fences the
        others off, and `set_aside` of those finds it out.
        """
        with (self.home / "lock").open("w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def set_aside(self) -> None:
        """Move what another job left out of the way; it is there until `drop_aside`.

        Raises
        ------
        FencedError
            Where a newer run has taken over: then all of this is that run's to decide.
        """
        aside = self.temporary / "aside"
        with self._fenced():
            aside.mkdir()
            for path in [*self._job_files(), *(Path(self.path, name) for name in self.parts())]:
                with contextlib.suppress(FileNotFoundError):
                    path.rename(aside / path.name)

    def drop_aside(self) -> None:
        """There is something new now: what another job left may go."""
        shutil.rmtree(self.temporary / "aside", ignore_errors=True)

    def put_back(self) -> None:
        """Nothing new came of it: what was set aside stands again where it stood.

        Ends this run. Where a unit has committed after all, the new job stays instead.
        """
        aside = self.home / f"old-{uuid.uuid4().hex}"
        try:
            (self.temporary / "aside").rename(aside)
        except FileNotFoundError:
            return
        self.close()  # first: from here on no unit of this run can commit
        has_new = any(parse_name(name) != (0, 0) for name in self.parts())
        if not has_new and any(aside.iterdir()):
            for path in [*self._job_files(), *(Path(self.path, name) for name in self.parts())]:
                path.unlink(missing_ok=True)
            for path in aside.iterdir():
                kept = self.home if path.suffix == ".json" else Path(self.path)
                path.rename(
                    (self.home / "started" if path.suffix == ".jsonl" else kept) / path.name
                )
        shutil.rmtree(aside, ignore_errors=True)

    def _job_files(self) -> list[Path]:
        found = [self.home / "manifest.json", self.home / "report.json"]
        return [p for p in [*found, *(self.home / "started").glob("*.jsonl")] if p.exists()]

    def close(self) -> None:
        """Remove the temporary files; whatever of this run still works cannot commit any more."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def parts(self) -> list[str]:
        """Names of the parts, in input order."""
        if not os.path.isdir(self.path):
            return []
        return sorted(name for name in os.listdir(self.path) if parse_name(name) is not None)

    def strangers(self) -> list[str]:
        """Names of files that are not ours."""
        if not os.path.isdir(self.path):
            return []
        names = sorted(os.listdir(self.path))
        return [name for name in names if name != "_pcm" and parse_name(name) is None]

    def has(self, name: str) -> bool:
        return os.path.exists(os.path.join(self.path, name))

    def read_note(self, name: str) -> dict[str, Any]:
        """What ``commit`` noted in a part: its unit and how many rows it has."""
        schema = pq.read_schema(os.path.join(self.path, name))
        note: dict[str, Any] = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
        return note

    def commit(self, name: str, table: pa.Table, note: dict[str, Any]) -> bool:
        """Write a part; False where another attempt was first.

        Raises
        ------
        FencedError
            Where a newer run has taken over this output.
        """
        noted = {**(table.schema.metadata or {}), METADATA_KEY: json.dumps(note).encode()}
        temporary = (
            self.temporary / f"{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        )
        final = os.path.join(self.path, name)
        with self._fenced(), temporary.open("xb") as file:
            pq.write_table(table.replace_schema_metadata(noted), file)
            file.flush()
            os.fsync(file.fileno())
        try:
            with self._fenced():
                is_first = _link(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.path)
        return is_first

    def note_start(self, name: str, n_rows: int | None) -> None:
        """Note that a unit begins: one line, one write."""
        line = json.dumps({"run": self.run, "unit": name, "rows": n_rows}) + "\n"
        file_name = f"{self.run}.{socket.gethostname()}.{os.getpid()}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with self._fenced():
            os.stat(self.temporary)  # a run that was replaced notes nothing any more
            descriptor = os.open(self.home / "started" / file_name, flags, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def starts(self) -> Iterator[dict[str, Any]]:
        """Every unit that was ever started here, in no order."""
        for path in (self.home / "started").glob("*.jsonl"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # torn by a lost node
                    yield json.loads(line)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a file under ``_pcm/`` in one step."""
        temporary = self.temporary / f"{name}.{uuid.uuid4().hex}"
        with self._fenced():
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.home / name)
        _sync_folder(self.home)

    @contextlib.contextmanager
    def _fenced(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one, or its folder"
                " was removed; what it was about to write was dropped."
            ) from error


def _link(temporary: Path, final: str) -> bool:
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.exists(final):
            return False
        os.replace(temporary, final)
    return True


def _sync_folder(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
