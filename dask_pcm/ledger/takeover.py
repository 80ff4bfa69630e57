"""Other runs of an output: seen, and fenced."""

from __future__ import annotations

from typing import Any

from dask_pcm.ledger.layout import CANCEL, HOME, PAUSE
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.stash import restore
from dask_pcm.ledger.status import Writer


def other_runs(output: Output) -> list[Writer]:
    """Other runs that are at work, or were and left their things."""
    found = []
    for name in output.storage.entries(HOME):
        if name.startswith("run-") and name.endswith("/") and name != f"run-{output.run}/":
            run = name[len("run-") : -1]
            says = read_driver(output, run)
            is_alive = output.storage.fence.is_alive(run, says)
            found.append(Writer(run, says or {}, is_alive))
    return found


def read_driver(output: Output, run: str) -> dict[str, Any] | None:
    """What a run says of its driver; None if it is gone, empty if it cannot be read."""
    return output.read_told(f"{HOME}/run-{run}/driver.json")


def read_requests(output: Output) -> frozenset[str]:
    """What is asked of this run: to pause, to cancel."""
    return frozenset(output.storage.entries(output.run_dir)) & {PAUSE, CANCEL}


def fence_others(output: Output, include_alive: bool = True) -> None:
    """Shut out every other run: none of them can commit once this returns.

    What a run had stashed, and came to nothing, is put back. Unless `include_alive`, only runs
    whose driver is gone are meant.
    """
    for other in other_runs(output):
        if include_alive or not other.is_alive:
            restore(output, output.storage.fence.fence_run(other.run))
    for name in output.storage.entries(HOME):
        # Left by a process that was killed while it opened a run, or fenced one.
        if name.startswith(("old-", "new-")) and name.endswith("/"):
            restore(output, f"{HOME}/{name[:-1]}")
