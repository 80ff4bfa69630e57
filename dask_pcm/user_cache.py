"""Results that are expensive to compute are cached across processes, as small JSON files.

They live under ``$XDG_CACHE_HOME/dask_pcm``, one file per key, readable by this user alone. The
cache is best effort: a missing, unreadable or unwritable file is never an error. Results that are
not JSON, such as model folders, have a ``cache_folder`` of their own and are handled by their
module.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any


def recall(kind: str, key: str) -> Any:
    """Return a cached value; None if there is none or it cannot be read.

    Parameters
    ----------
    kind, key
        The names of a folder and of a file in it.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError, RuntimeError):
        return json.loads((cache_folder(kind) / f"{key}.json").read_bytes())
    return None


def note(kind: str, key: str, value: Any) -> None:
    """Cache a value that JSON can represent; do nothing if the home folder is not writable."""
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home folder
        folder = cache_folder(kind)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written elsewhere, then renamed: concurrent readers see the old or the new value whole.
        temporary = folder / f"{key}.{os.getpid()}.{time.monotonic_ns()}"
        temporary.write_text(json.dumps(value))
        temporary.replace(folder / f"{key}.json")


def cache_folder(kind: str) -> Path:
    """The folder of one kind of results, which need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "dask_pcm", kind)
