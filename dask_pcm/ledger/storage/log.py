"""Where lines of the log are written: a file per process, or an object per line.

For the lines themselves see ``log_lines.py``.
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

#: The longest object name that all stores accept.
MAX_NAME_BYTES = 1024
_N_READERS = 16


@dataclass(frozen=True, slots=True)
class FileLog(Log):
    """A file per process, to which lines are appended.

    Appends of several hosts to one file can overwrite each other on NFS.
    """

    files: FolderFiles

    def append(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        """Append a line to the file of this process; FencedError if the run is fenced."""
        files, tree = self.files, self.files.tree
        name = f"{LOG}/{files.run}.{socket.gethostname()}.{os.getpid()}.jsonl"
        with files.fenced():
            # The log file stays when the run is fenced, so an append alone would succeed. This
            # check can come a moment too early; a line too many is harmless.
            tree.status(files.run_dir)
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
        """Lines of all files, also those of fenced runs."""
        for name in self.files.entries(LOG):
            # Runs make no folders here.
            if not name.endswith("/"):
                yield from filter(None, self.files.read(f"{LOG}/{name}").splitlines())


def _append_line(descriptor: int, data: bytes) -> None:
    """Append a line, by one write unless the disk is about to be full."""
    n_bytes = os.fstat(descriptor).st_size
    # A torn line has no line break. Without one, this line would be lost together with it.
    if n_bytes and os.pread(descriptor, 1, n_bytes - 1) != b"\n":
        data = b"\n" + data
    # After a short write, the next one either continues or raises the reason.
    while data:
        data = data[os.write(descriptor, data) :]


@dataclass(frozen=True, slots=True)
class ObjectLog(Log):
    """An object per line, with the line in its name.

    Nothing can be appended to an object. One listing returns a thousand names, while reading as
    many objects takes a request each.
    """

    files: ObjectFiles

    def append(self, line: Mapping[str, Any], is_synced: bool = False) -> None:
        """Put an object for a line; FencedError if the run is fenced."""
        files = self.files
        files.check_fence()
        encoded, name = encode_line(line), f"{LOG}/{uuid.uuid4().hex[:12]}"
        named = f"{name}.{base64.urlsafe_b64encode(encoded).decode()}"
        if files.is_flat and len(files.url(named).encode()) <= MAX_NAME_BYTES:
            files.put(named, b"-")
        else:
            files.put(name, encoded)

    def texts(self) -> Iterator[bytes]:
        """Lines from names of objects, and from content where the name was too long."""
        with ThreadPoolExecutor(_N_READERS) as pool:
            yield from pool.map(self._text, self.files.entries(LOG))

    def _text(self, name: str) -> bytes:
        _, dot, text = name.partition(".")
        # ValueError: the name is no base64, so another tool has put the object.
        with contextlib.suppress(ValueError, FileNotFoundError, IsADirectoryError):
            return base64.urlsafe_b64decode(text) if dot else self.files.read(f"{LOG}/{name}")
        return b""
