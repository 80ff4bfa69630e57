"""Lines of the log: a unit starts, a function is called on rows, a part is committed.

The log saves reading parts, and shows what was computed twice. It decides nothing, since each part
has a note of its own. So a torn, damaged or lost line costs reading its part, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dask_pcm.ledger.decode import are_ranges, is_count, parse
from dask_pcm.ledger.parts import parse_name


def encode_line(line: Mapping[str, Any]) -> bytes:
    """Encode a line, with its line break."""
    return f"{json.dumps(line)}\n".encode()


def commit_line(
    run: str, name: str, n_bytes: int, note: Mapping[str, Any], stamp: str
) -> dict[str, Any]:
    """The line for a part that is about to be committed."""
    counts = {"rows": note["rows"], "failed": note["failed"], "begun": note.get("begun", "")}
    return {"run": run, "commit": name, **counts, "bytes": n_bytes, "stamp": stamp}


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Decode a line, of which all keys that readers use have the right types; None if damaged."""
    try:
        line = parse(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and _is_sound(line) else None


def _is_sound(line: Mapping[str, Any]) -> bool:
    if not isinstance(line.get("run"), str):
        return False
    if "commit" in line:
        counts = [line.get(key) for key in ("rows", "failed", "bytes")]
        # Lines of older versions have no generation.
        texts = [line.get("stamp"), line.get("begun", "")]
        has_types = all(map(is_count, counts)) and all(isinstance(text, str) for text in texts)
        return has_types and _is_part(line["commit"])
    if "start" in line:
        return _is_part(line["start"])
    is_named = isinstance(line.get("journal"), str | None)
    return "called" in line and are_ranges(line["called"]) and is_named


def _is_part(name: Any) -> bool:
    return isinstance(name, str) and parse_name(name) is not None
