"""The ledger's log: a unit begins, a function is called on rows, a part is committed.

The log saves reading parts, and tells what was computed twice. It decides nothing: what a part is,
its own note says. So a line that was torn, damaged or lost costs a look at its part, no more.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dask_pcm.ledger.layout import LOG
from dask_pcm.ledger.log_lines import encode_line
from dask_pcm.ledger.storage.base import Log
from dask_pcm.ledger.storage.folder_files import FolderFiles
from dask_pcm.ledger.storage.object_files import ObjectFiles

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
