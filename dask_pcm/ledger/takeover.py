"""Other runs of an output: find them, and fence them to take the output over."""

from __future__ import annotations

from typing import Any

from dask_pcm.ledger.layout import CANCEL, HOME, PAUSE
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.stash import restore_stash
from dask_pcm.ledger.writer import Writer


def other_runs(output: Output) -> list[Writer]:
    """Other runs that are at work, or that died and left their run directory."""
    found = []
    for name in output.storage.entries(HOME):
        if name.startswith("run-") and name.endswith("/") and name != f"run-{output.run}/":
            run = name[len("run-") : -1]
            says = read_driver(output, run)
            is_alive = output.storage.fence.is_alive(run, says)
            found.append(Writer(run, says or {}, is_alive))
    return found


def read_driver(output: Output, run: str) -> dict[str, Any] | None:
    """What a run says about its driver; None if it has ended, empty if it cannot be read."""
    return output.read_told(f"{HOME}/run-{run}/driver.json")


def read_requests(output: Output) -> frozenset[str]:
    """Requests to this run: ``pause``, ``cancel``."""
    return frozenset(output.storage.entries(output.run_dir)) & {PAUSE, CANCEL}


def fence_others(output: Output, include_alive: bool = True) -> None:
    """Fence other runs: none of them can commit once this returns.

    If nothing came of a run that had stashed the output of another job, that is put back. Without
    `include_alive`, only runs whose driver has died are fenced.
    """
    for other in other_runs(output):
        if include_alive or not other.is_alive:
            restore_stash(output, output.storage.fence.fence_run(other.run))
    for name in output.storage.entries(HOME):
        # Left by a process that was killed while it registered a run, or while it fenced one and
        # put its stash back. No live run uses them, as the caller holds the takeover lock.
        if name.startswith(("old-", "new-")) and name.endswith("/"):
            restore_stash(output, f"{HOME}/{name[:-1]}")
