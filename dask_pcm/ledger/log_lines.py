"""Lines of the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dask_pcm.ledger.decode import are_ranges, is_count, parse
from dask_pcm.ledger.parts import parse_name


def encode_line(line: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(line)}\n".encode()


def commit_line(
    run: str, name: str, n_bytes: int, note: Mapping[str, Any], stamp: str
) -> dict[str, Any]:
    """What is noted of a part that is about to be committed."""
    counts = {"rows": note["rows"], "failed": note["failed"], "begun": note.get("begun", "")}
    return {"run": run, "commit": name, **counts, "bytes": n_bytes, "stamp": stamp}


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line, with everything in it that its readers rely on; None for a damaged one."""
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
        texts = [line.get("stamp"), line.get("begun", "")]
        is_draining = all(map(is_count, counts)) and all(isinstance(text, str) for text in texts)
        return is_draining and _is_part(line["commit"])
    if "start" in line:
        return _is_part(line["start"])
    is_named = isinstance(line.get("journal"), str | None)
    return "called" in line and are_ranges(line["called"]) and is_named


def _is_part(name: Any) -> bool:
    return isinstance(name, str) and parse_name(name) is not None
