"""The takeover lock in a store that puts conditionally: numbered objects, each created once."""

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
    """A lock that is held by creating the next of a series of numbered objects.

    The last object is the lock. It holds the id of the run that has it; it is free once it is
    emptied, or has not been written for `SILENT_S`. The last object is never removed, only
    followed by the next. If it were removed, one of two runs that find it silent at the same time
    could remove what the other has just created.
    """

    files: ObjectFiles

    @contextlib.contextmanager
    def takeover_lock(self) -> Iterator[None]:
        """Hold the lock that serialises takeovers; see ``Fence``."""
        lock, mine = self._take(), self.files.run.encode()
        try:
            with refreshing(lambda: self.files.put(lock, mine), SILENT_S):
                yield
        finally:
            self.files.put(lock, b"")

    def _take(self) -> str:
        files, since = self.files, time.monotonic()
        for attempt in itertools.count():
            if attempt and time.monotonic() - since > SILENT_S:
                since = time.monotonic()
                logger.warning("Waiting for another run that takes over %s", redacted(files.path))
            number, last = self._last()
            lock = f"{HOME}/lock-{number + 1:09d}"
            if (last is None or self._is_free(last)) and files.create(lock, files.run.encode()):
                # Other runs may have taken and passed on later locks since our listing, and removed
                # the older ones, ours among them: then ours was created anew behind the last.
                if self._last()[1] == lock:
                    for name in self._names()[:-1]:
                        files.remove(f"{HOME}/{name}")
                    return lock
                files.remove(lock)
            time.sleep(POLL_S)
        raise AssertionError("itertools.count() does not end")

    def _is_free(self, lock: str) -> bool:
        try:
            return not self.files.read(lock) or age_s(self.files, lock) > SILENT_S
        except FileNotFoundError:
            # Removed since it was listed, so a later one has been created: look again.
            return False

    def _last(self) -> tuple[int, str | None]:
        names = self._names()
        return (int(names[-1].partition("-")[2]), f"{HOME}/{names[-1]}") if names else (0, None)

    def _names(self) -> list[str]:
        return [name for name in self.files.entries(HOME) if _LOCK.fullmatch(name)]


def age_s(files: ObjectFiles, name: str) -> float:
    """Seconds since an object was written, by the store's clock; infinity if there is none.

    The time of an object that is written now is compared with that of the object: clocks of hosts
    may differ by more than the limits that ages are compared with.
    """
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
