"""The ledger's log: a unit begins, a function is called on rows, a part is committed.

The log saves reading parts, and tells what was computed twice. It decides nothing: what a part is,
its own note says. So a line that was torn, damaged or lost costs a look at its part, no more.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dask_pcm.ledger.decode import are_ranges, is_count, parse
from dask_pcm.ledger.folder_files import FolderFiles
from dask_pcm.ledger.object_files import ObjectFiles
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.ledger.storage import LOG, Log

#: A name of an object is no longer than this in any store.
MAX_NAME_BYTES = 1024
_N_READERS = 16


@dataclass(frozen=True, slots=True)
class FileLog(Log):
    """A file per process, to which lines are appended."""

    files: FolderFiles

    def append(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        files, tree = self.files, self.files.tree
        name = f"{LOG}/{files.run}.{socket.gethostname()}.{os.getpid()}.jsonl"
        with files.fenced():
            tree.status(files.run_dir)  # a run that was replaced notes nothing any more
            try:
                descriptor = tree.open(name, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                descriptor = files.create(name, os.O_RDWR | os.O_APPEND)
            try:
                _append_line(descriptor, encode_line(line))
                if is_synced:
                    os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def texts(self) -> Iterator[bytes]:
        for name in self.files.entries(LOG):
            if not name.endswith("/"):  # a folder is none of ours
                yield from filter(None, self.files.read(f"{LOG}/{name}").splitlines())


def _append_line(descriptor: int, data: bytes) -> None:
    """Append a line in one write, if there is room for all of it."""
    n_bytes = os.fstat(descriptor).st_size
    if n_bytes and os.pread(descriptor, 1, n_bytes - 1) != b"\n":  # the line before was torn
        data = b"\n" + data
    while data:  # what is written in part is followed by the rest, or by an error that says why
        data = data[os.write(descriptor, data) :]


@dataclass(frozen=True, slots=True)
class ObjectLog(Log):
    """An object per line, which its name holds.

    Nothing can be appended to an object, and reading many small ones is slow.
    """

    files: ObjectFiles

    def append(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        files = self.files
        files.check_fence()
        said, name = encode_line(line), f"{LOG}/{uuid.uuid4().hex[:12]}"
        telling = f"{name}.{base64.urlsafe_b64encode(said).decode()}"
        if files.is_flat and len(files.url(telling).encode()) <= MAX_NAME_BYTES:
            files.put(telling, b"-")
        else:
            files.put(name, said)

    def texts(self) -> Iterator[bytes]:
        with ThreadPoolExecutor(_N_READERS) as pool:
            yield from pool.map(self._text, self.files.entries(LOG))

    def _text(self, name: str) -> bytes:
        _, dot, text = name.partition(".")
        with contextlib.suppress(ValueError, FileNotFoundError, IsADirectoryError):  # not ours
            return base64.urlsafe_b64decode(text) if dot else self.files.read(f"{LOG}/{name}")
        return b""


def encode_line(line: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(line)}\n".encode()


def commit_line(
    run: str, name: str, n_bytes: int, note: Mapping[str, Any], stamp: str
) -> dict[str, Any]:
    """What is noted of a part that is about to be committed."""
    counts = {"rows": note["rows"], "failed": note["failed"], "begun": note.get("begun", "")}
    return {"run": run, "commit": name, **counts, "bytes": n_bytes, "stamp": stamp}


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line, with everything in it that its readers rely on; None for a damaged one."""
    try:
        line = parse(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and _is_sound(line) else None


def _is_sound(line: Mapping[str, Any]) -> bool:
    if not isinstance(line.get("run"), str):
        return False
    if "commit" in line:
        counts = [line.get(key) for key in ("rows", "failed", "bytes")]
        texts = [line.get("stamp"), line.get("begun", "")]
        is_draining = all(map(is_count, counts)) and all(isinstance(text, str) for text in texts)
        return is_draining and _is_part(line["commit"])
    if "start" in line:
        return _is_part(line["start"])
    is_named = isinstance(line.get("journal"), str | None)
    return "called" in line and are_ranges(line["called"]) and is_named


def _is_part(name: Any) -> bool:
    return isinstance(name, str) and parse_name(name) is not None


def note_start(output: Output, unit: str, n_rows: int | None) -> None:
    """Note that a unit begins whose rows are computed as a whole."""
    output.storage.log.append({"run": output.run, "start": unit, "rows": n_rows})


def note_called(output: Output, rows: Iterable[Range], journal: str | None, run: str) -> None:
    """Note rows that a function by rows was called on, by an attempt of a run.

    What the same journal tells counts once, however many note it.
    """
    if ranges := list(Ranges(rows)):
        output.storage.log.append({"run": run, "called": ranges, "journal": journal})


def read_lines(output: Output) -> Iterator[dict[str, Any]]:
    """Everything that was ever noted here, in no order; damaged lines are left out."""
    texts = output.storage.log.texts()
    return (line for line in map(parse_line, texts) if line is not None)
