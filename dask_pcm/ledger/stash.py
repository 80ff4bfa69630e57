"""What another job left in an output, stashed while a new one begins; and put back.

An overwriting run moves the old job's files into its own folder. They are dropped when something
has come of the new job, and stand again where they stood if nothing has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dask_pcm.ledger.layout import JOURNAL, LOG, MANIFEST, REPORT
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.storage.base import Storage

_ASIDE = "aside"


def stash(output: Output) -> None:
    """Move what another job left out of the way; it is there until ``drop_stash``.

    The manifest goes first, and comes back last. So, wherever this or ``restore`` is killed, a
    manifest beside stashed files is that of a new job, and without one they are to be put back.
    """
    for name in [*_job_files(output.storage), *output.parts()]:
        with contextlib.suppress(FileNotFoundError):
            output.storage.move(name, f"{output.run_dir}/{_ASIDE}/{name}")


def drop_stash(output: Output) -> None:
    """There is something new now: what another job left may go."""
    output.storage.remove(f"{output.run_dir}/{_ASIDE}")


def unstash(output: Output) -> None:
    """Nothing new came of this run: what it stashed stands again where it stood.

    Ends this run. Where a unit has committed after all, the new job stays instead.
    """
    fence = output.storage.fence
    with fence.takeover_lock():
        if next(_walk(output.storage, f"{output.run_dir}/{_ASIDE}"), None):
            restore(output, fence.fence_run(output.run))  # first: from now on none of it commits


def restore(output: Output, run_dir: str) -> None:
    """Put back what a fenced run had stashed, and remove the rest of it.

    Killed at any point, it goes on where it was when it is called again.
    """
    storage, aside = output.storage, f"{run_dir}/{_ASIDE}"
    kept = list(_walk(storage, aside))
    if kept and storage.exists(MANIFEST):
        if any(parse_name(name) != (0, 0) for name in output.parts()):
            kept = []  # something has come of the new job
        else:
            for name in reversed([*_job_files(storage), *output.parts()]):
                storage.remove(name)
    for name in sorted(kept, key=lambda name: name == MANIFEST):
        storage.move(f"{aside}/{name}", name)
    storage.remove(run_dir)


def _job_files(storage: Storage) -> list[str]:
    lines = [f"{folder}/{n}" for folder in (LOG, JOURNAL) for n in _walk(storage, folder)]
    return [*(name for name in (MANIFEST, REPORT) if storage.exists(name)), *lines]


def _walk(storage: Storage, folder: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it."""
    for name in storage.entries(folder):
        if name.endswith("/"):
            yield from (f"{name}{below}" for below in _walk(storage, f"{folder}/{name[:-1]}"))
        else:
            yield name
