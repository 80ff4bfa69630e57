"""File locks (flock) that end with their process, so a crash leaves none behind.

The holder of a lock may remove its file, as the last step under the lock. A process that waited for
the lock therefore checks that the path still names the locked file, and otherwise starts over. So
two processes never hold locks of one name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

#: Interval between attempts, and between warnings about a long wait.
_POLL_S, _SAY_S = 0.02, 30.0


@contextmanager
def locked(path: Path, how: int) -> Iterator[int]:
    """Hold a lock on `path`, which is created if missing; yield its descriptor.

    Parameters
    ----------
    how
        ``LOCK_SH`` or ``LOCK_EX``, with ``LOCK_NB`` to fail instead of waiting.

    Raises
    ------
    BlockingIOError
        If another process or thread holds the lock and `how` includes ``LOCK_NB``.
    """
    start = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if _is_taken(descriptor, path, how):
                yield descriptor
                return
        finally:
            os.close(descriptor)
        if time.monotonic() - start > _SAY_S:
            start = time.monotonic()
            logger.warning("Waiting for another process of this host that holds %s", path.name)
        time.sleep(_POLL_S)


def _is_taken(descriptor: int, path: Path, how: int) -> bool:
    """Take a lock; False if it is held elsewhere, or if the file was removed meanwhile."""
    # Always without blocking: a wait in flock() could not notice that the file was removed.
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    except BlockingIOError:
        if how & fcntl.LOCK_NB:
            raise
        return False


def is_held(path: Path) -> bool:
    """Whether a process or thread holds an exclusive lock on `path`."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
