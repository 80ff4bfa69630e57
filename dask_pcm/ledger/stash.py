"""The output of another job, stashed while a new job begins, and put back if nothing comes of it.

An overwriting run moves the files of the old job into its run directory. They are dropped once the
new job has a result, and moved back if it ends without one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dask_pcm.ledger.layout import JOURNAL, LOG, MANIFEST, REPORT, STASH
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.storage.base import Storage


def stash(output: Output) -> None:
    """Move the files of another job into the run directory; they stay there until ``drop_stash``.

    The manifest is moved first, and moved back last. So, wherever this or ``restore_stash`` is
    killed: if there are stashed files, a manifest in its place is that of the new job; if there is
    none in its place, the stash is to be put back.
    """
    for name in [*_job_files(output.storage), *output.parts()]:
        # A worker of the old job may remove a journal at any time.
        with contextlib.suppress(FileNotFoundError):
            output.storage.move(name, f"{output.run_dir}/{STASH}/{name}")


def drop_stash(output: Output) -> None:
    """Remove the stashed files: the new job has a result."""
    output.storage.remove(f"{output.run_dir}/{STASH}")


def unstash(output: Output) -> None:
    """Put back what this run has stashed, as nothing came of it.

    Ends this run. If a unit has committed after all, the new job stays instead.
    """
    fence = output.storage.fence
    with fence.takeover_lock():
        if next(_walk(output.storage, f"{output.run_dir}/{STASH}"), None):
            # Fenced first: a unit that commits between the look at the parts and the moves would
            # leave its part in the old job's output.
            restore_stash(output, fence.fence_run(output.run))


def restore_stash(output: Output, run_dir: str) -> None:
    """Put back what a fenced run has stashed, and remove the rest of its run directory.

    If this is killed at any point, calling it again completes it.
    """
    storage, stashed = output.storage, f"{run_dir}/{STASH}"
    kept = list(_walk(storage, stashed))
    if kept and storage.exists(MANIFEST):
        # The empty first part is committed before any unit, so it is no result.
        if any(parse_name(name) != (0, 0) for name in output.parts()):
            kept = []
        else:
            # The manifest is removed last. If it were gone when this is killed, the next call
            # would keep the new job's other files beside those of the old job.
            for name in reversed([*_job_files(storage), *output.parts()]):
                storage.remove(name)
    for name in sorted(kept, key=lambda name: name == MANIFEST):
        storage.move(f"{stashed}/{name}", name)
    storage.remove(run_dir)


def _job_files(storage: Storage) -> list[str]:
    """Files of the job in ``_pcm``, the manifest first."""
    lines = [f"{folder}/{n}" for folder in (LOG, JOURNAL) for n in _walk(storage, folder)]
    return [*(name for name in (MANIFEST, REPORT) if storage.exists(name)), *lines]


def _walk(storage: Storage, folder: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it."""
    for name in storage.entries(folder):
        if name.endswith("/"):
            yield from (f"{name}{below}" for below in _walk(storage, f"{folder}/{name[:-1]}"))
        else:
            yield name
