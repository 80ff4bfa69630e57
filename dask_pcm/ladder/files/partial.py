"""A blob while it is staged, and what is noted of one that is complete."""

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
    """A blob that is being staged; threads may write its chunks, in any order."""

    def __init__(self, place: Path, blob: Blob) -> None:
        self.blob = blob
        self._place = place
        self._part = place.with_suffix(".part")
        self._start = time.monotonic()
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o600)
        #: Chunks that are here and verified.
        self.have = verified_chunks(self._descriptor, blob)

    def __enter__(self) -> PartialBlob:
        return self

    def __exit__(self, *args: object) -> None:
        """Close it; complete, it stands under its name from now on."""
        os.close(self._descriptor)
        if len(self.have) == self.blob.n_chunks:
            seconds = time.monotonic() - self._start
            self._part.rename(self._place)
            self._place.chmod(0o400)
            write_note(self._place, {"state": state(self._place), "seconds": seconds})

    def reopened(self) -> int | None:
        """Another descriptor of the file, to be closed; None where it has been completed."""
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._part, os.O_RDONLY)
        return None

    @property
    def missing(self) -> list[int]:
        """Chunks that are not here."""
        return [chunk for chunk in range(self.blob.n_chunks) if chunk not in self.have]

    def write(self, chunk: int, data: bytes | bytearray | memoryview) -> bool:
        """Write a chunk; False where `data` is not what should stand there.

        Raises
        ------
        DiskError
            Where the disk is full.
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
    """Chunks of an open file that hold what they should."""
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
    """What changes when a file is written to, or the machine starts anew."""
    status = place.stat()
    return [status.st_size, status.st_mtime_ns, _boot()]


def read_note(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.with_suffix(".note").read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def write_note(place: Path, note: dict[str, Any]) -> None:
    temporary = place.with_suffix(f".{uuid.uuid4().hex}")
    try:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(note))
        temporary.replace(place.with_suffix(".note"))
    except OSError as error:  # without it the file is verified when it is used
        temporary.unlink(missing_ok=True)
        logger.warning("%s could not be noted: %s", place, error)


@functools.cache
def _boot() -> str:
    """Which boot of the machine this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
