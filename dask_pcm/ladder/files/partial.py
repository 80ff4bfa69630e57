"""A partial blob collects verified chunks until it is complete, then gets its final name.

Beside a complete blob lies a note: what staging took, and the file's state when it was verified.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dask_pcm.context.bundles import Blob
from dask_pcm.errors import DiskError

logger = logging.getLogger(__name__)

_N_READERS = 4


class PartialBlob:
    """A blob that is being staged; any thread may write its chunks, in any order.

    A context manager. The caller holds the blob's lock for staging.
    """

    def __init__(self, place: Path, blob: Blob) -> None:
        self.blob = blob
        self._place = place
        self._part = place.with_suffix(".part")
        self._start = time.monotonic()
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o600)
        #: Chunks that are present and verified, including those of an earlier attempt.
        self.have = verified_chunks(self._descriptor, blob)

    def __enter__(self) -> PartialBlob:
        return self

    def __exit__(self, *args: object) -> None:
        """Close the file; rename it to its final name if it is complete."""
        os.close(self._descriptor)
        if len(self.have) == self.blob.n_chunks:
            seconds = time.monotonic() - self._start
            # Atomic: under its final name a blob is always complete.
            self._part.rename(self._place)
            self._place.chmod(0o400)
            write_note(self._place, {"state": state(self._place), "seconds": seconds})

    def reopened(self) -> int | None:
        """Open the file once more, for reading; None if it was completed meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._part, os.O_RDONLY)
        return None

    @property
    def missing(self) -> list[int]:
        """Chunks that are still missing, in order."""
        return [chunk for chunk in range(self.blob.n_chunks) if chunk not in self.have]

    def write(self, chunk: int, data: bytes | bytearray | memoryview) -> bool:
        """Write a chunk after verifying its digest; False if it does not match.

        Raises
        ------
        DiskError
            If it cannot be written, for instance because the disk is full.
        """
        if not self.blob.holds(chunk, data):
            return False
        at, _ = self.blob.span(chunk)
        rest = memoryview(data)
        try:
            while rest:
                n_written = os.pwrite(self._descriptor, rest, at)
                rest, at = rest[n_written:], at + n_written
        except OSError as error:
            raise DiskError(
                f"A file of {self.blob.n_bytes:,} bytes cannot be staged in"
                f" {str(self._place.parent)!r}: {error}. Make room there, or choose another disk"
                " (pcm.ladder.disk.path)."
            ) from error
        self.have.add(chunk)
        return True


def verified_chunks(descriptor: int, blob: Blob) -> set[int]:
    """The chunks of an open file whose digests match."""
    n_bytes = os.fstat(descriptor).st_size
    if not n_bytes:
        return set()

    def is_whole(chunk: int) -> bool:
        start, stop = blob.span(chunk)
        return stop <= n_bytes and blob.holds(chunk, os.pread(descriptor, stop - start, start))

    with ThreadPoolExecutor(_N_READERS) as pool:
        found = pool.map(is_whole, range(blob.n_chunks))
        return {chunk for chunk, is_there in enumerate(found) if is_there}


def state(place: Path) -> list[object]:
    """A value that changes when the file is written to or the machine reboots."""
    status = place.stat()
    return [status.st_size, status.st_mtime_ns, _boot()]


def read_note(place: Path) -> dict[str, Any]:
    """Read a blob's note; empty if it is missing or unreadable."""
    try:
        found = json.loads(place.with_suffix(".note").read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def write_note(place: Path, note: dict[str, Any]) -> None:
    """Write a blob's note atomically; a failure is logged, not raised."""
    temporary = place.with_suffix(f".{uuid.uuid4().hex}")
    try:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(note))
        temporary.replace(place.with_suffix(".note"))
    except OSError as error:  # without a note the blob is verified again when it is used
        temporary.unlink(missing_ok=True)
        logger.warning("The note of %s could not be written: %s", place, error)


@functools.cache
def _boot() -> str:
    """The id of the machine's current boot; empty if it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
