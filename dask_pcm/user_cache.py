"""What was found out at some cost, and holds for other processes of this user: small JSON files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any


def recall(kind: str, key: str) -> Any:
    """What was noted; None where nothing was, or it cannot be read.

    Parameters
    ----------
    kind, key
        Names of a folder and of a file in it.
    """
    with contextlib.suppress(OSError, ValueError):
        return json.loads((_folder(kind) / f"{key}.json").read_bytes())
    return None


def note(kind: str, key: str, value: Any) -> None:
    """Remember a value that JSON can say; a home that cannot be written is no error."""
    with contextlib.suppress(OSError):
        folder = _folder(kind)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = folder / f"{key}.{os.getpid()}.{time.monotonic_ns()}"
        temporary.write_text(json.dumps(value))
        temporary.replace(folder / f"{key}.json")


def _folder(kind: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "dask_pcm", kind)
