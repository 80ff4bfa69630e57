"""How a run stands, from what it has written: for processes that do not drive it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask_pcm.ledger.layout import HOME, REPORT
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.ledger.writer import Writer
from dask_pcm.runs.identity import Manifest
from dask_pcm.runs.progress.progress import FINISHED, INTERRUPTED, STARTING, Progress
from dask_pcm.runs.progress.report import Report


def stored_progress(output: Output, writer: Writer | None) -> Progress:
    """How far the job of an output is; `writer` is the run that drives it, or drove it and died."""
    if writer is None or (not writer.is_alive and _has_reported(output, writer.run)):
        return _of_ended(output)
    found = output.read_told(f"{HOME}/run-{writer.run}/status.json") or {}
    if writer.is_alive:
        return Progress.of(found) if "state" in found else _counted(output, {}, STARTING)
    return _counted(output, found, INTERRUPTED)


def _has_reported(output: Output, run: str) -> bool:
    return (output.read_told(REPORT) or {}).get("run") == run


def _of_ended(output: Output) -> Progress:
    found = output.read_told(REPORT)
    if not found:
        return _counted(output, {}, INTERRUPTED)
    report = Report.of({"state": FINISHED, **found})
    counts = {"failed": report.rows_failed, "per_s": report.rows_per_s}
    return _counted(output, counts, report.state)


def _counted(output: Output, found: Mapping[str, Any], state: str) -> Progress:
    """Count the parts, which exist regardless of the last status of a dead run."""
    manifest = Manifest.read(output)
    recorded = manifest.recorded if manifest is not None else {}
    places = [parse_name(name) for name in output.parts()]
    done = Ranges(place for place in places if isinstance(place, tuple)).n_rows
    done += sum(isinstance(place, int) for place in places)
    total = recorded.get("total", done)
    counts = {"total": total, "counted": recorded.get("counted", "rows")}
    return Progress.of({**counts, **found}, state=state, done=min(done, total))
