"""The lock of an object store that puts conditionally: numbered objects, each created once."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from dask_pcm.errors import redacted
from dask_pcm.ledger.layout import HOME
from dask_pcm.ledger.storage.lock_files import POLL_S, SILENT_S, refreshing
from dask_pcm.ledger.storage.object_files import ObjectFiles

logger = logging.getLogger(__name__)

_LOCK = re.compile(r"lock-\d{9}")


@dataclass(frozen=True, slots=True)
class LockObjects:
    """Who creates the next of numbered objects holds the lock.

    The last one says who holds it, until it is emptied or has not been written for a while. It is
    never removed, only followed: else one of two who find it old at the same moment could remove
    what the other has just created.
    """

    files: ObjectFiles

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        """Of several runs that begin at once, one at a time is in here."""
        lock, mine = self._take(), self.files.run.encode()
        try:
            with refreshing(lambda: self.files.put(lock, mine), SILENT_S):
                yield
        finally:
            self.files.put(lock, b"")

    def _take(self) -> str:
        files, begun = self.files, time.monotonic()
        for attempt in itertools.count():
            if attempt and time.monotonic() - begun > SILENT_S:
                begun = time.monotonic()
                logger.warning("Waiting for another run that takes over %s", redacted(files.path))
            number, last = self._last()
            lock = f"{HOME}/lock-{number + 1:09d}"
            if (last is None or self._is_free(last)) and files.create(lock, files.run.encode()):
                if self._last()[1] == lock:  # else we had looked too long ago
                    for name in self._names()[:-1]:
                        files.remove(f"{HOME}/{name}")
                    return lock
                files.remove(lock)
            time.sleep(POLL_S)
        raise AssertionError  # it counts for ever

    def _is_free(self, lock: str) -> bool:
        try:
            return not self.files.read(lock) or age_s(self.files, lock) > SILENT_S
        except FileNotFoundError:  # another run was first
            return False

    def _last(self) -> tuple[int, str | None]:
        names = self._names()
        return (int(names[-1].partition("-")[2]), f"{HOME}/{names[-1]}") if names else (0, None)

    def _names(self) -> list[str]:
        return [name for name in self.files.entries(HOME) if _LOCK.fullmatch(name)]


def age_s(files: ObjectFiles, name: str) -> float:
    """Seconds since an object was written, by the store's clock; infinity if there is none."""
    probe = f"{HOME}/clock-{files.run}"
    files.put(probe, b"now")
    try:
        now, then = (_modified(files, each) for each in (probe, name))
    except FileNotFoundError:
        return float("inf")
    finally:
        files.remove(probe)
    return (now - then).total_seconds()


def _modified(files: ObjectFiles, name: str) -> datetime:
    fs = files.fs
    fs.invalidate_cache()
    when: datetime = fs.modified(files.url(name))
    return when
