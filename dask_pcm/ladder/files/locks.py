"""Locks of the kernel on files (flock): they end with the process that has them.

A lock's file may be removed by whoever holds it, as the last thing that is done under it. Who has
waited for it looks whether it is still there, so that never two hold locks of one name.
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

_POLL_S, _SAY_S = 0.02, 30.0


@contextmanager
def locked(path: Path, how: int) -> Iterator[int]:
    """Hold a lock, on a file that is made if there is none; yields its descriptor.

    Raises
    ------
    BlockingIOError
        Where another has it and `how` says not to wait.
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
            logger.warning("Waiting for another process of this host that has %s", path.name)
        time.sleep(_POLL_S)


def _is_taken(descriptor: int, path: Path, how: int) -> bool:
    """Take a lock; False where another has it, or the file has been removed in the meantime."""
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
    """Whether somebody has a lock for himself."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
