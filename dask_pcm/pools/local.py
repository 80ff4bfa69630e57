"""Jobs that are processes of this machine: for laptops, and for tests of what is above them."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from dask_pcm.errors import PoolError
from dask_pcm.pools.batch import (
    JobState,
    Start,
    jobqueue,
    launcher_options,
    log_of,
    scrubbed,
)

#: Between the signal that asks a job to end and the one that ends it.
_KILL_S = 10.0


class Local:
    """Starts jobs as child processes, each in a process group of its own; see ``BatchSystem``."""

    can_exclude = False

    def __init__(self) -> None:
        self._jobs: dict[str, subprocess.Popen[bytes]] = {}
        self._numbers = itertools.count(1)
        self._prefix = os.urandom(3).hex()  # two clusters of one process have jobs of their own

    async def check(self, start: Start) -> None:
        """See ``BatchSystem``."""
        python = start.pool.python
        if python is not None and not os.access(python, os.X_OK):
            raise PoolError(f"The interpreter {python!r} cannot be run.")

    async def submit(self, start: Start, n_jobs: int) -> list[str]:
        """See ``BatchSystem``."""
        ids = []
        for _ in range(n_jobs):
            job = f"{self._prefix}.{next(self._numbers)}"
            with log_of(start, job).open("wb") as log:
                self._jobs[job] = subprocess.Popen(
                    ["/bin/sh", "-c", script(start)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**scrubbed(os.environ), "PCM_JOB_ID": job},
                    # Ctrl-C in the terminal is not for the workers.
                    start_new_session=True,
                )
            ids.append(job)
        return ids

    async def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        """See ``BatchSystem``."""
        known = {job: self._jobs[job] for job in jobs if job in self._jobs}
        for one in known.values():
            if one.poll() is not None:  # as batch systems do, nothing of a job outlives it
                _kill_group(one)
        return {job: JobState(True) for job, one in known.items() if one.poll() is None}

    async def cancel(self, jobs: Sequence[str]) -> None:
        """See ``BatchSystem``."""
        for job in jobs:
            self._signal(job, signal.SIGTERM)
            asyncio.get_running_loop().call_later(_KILL_S, self._signal, job, signal.SIGKILL)

    def log(self, start: Start, job: str) -> Path:
        """See ``BatchSystem``."""
        return log_of(start, job)

    def close(self) -> None:
        """See ``BatchSystem``; waits for the jobs to end."""
        stop = time.monotonic() + _KILL_S
        while any(one.poll() is None for one in self._jobs.values()) and time.monotonic() < stop:
            time.sleep(0.05)
        for job, one in self._jobs.items():
            self._signal(job, signal.SIGKILL)
            one.wait()

    def _signal(self, job: str, number: signal.Signals) -> None:
        """Send a signal to a job's process; SIGKILL to all that it has started."""
        one = self._jobs.get(job)
        if one is None or one.poll() is not None:
            return
        if number is signal.SIGKILL:
            _kill_group(one)
        else:
            one.send_signal(number)


def _kill_group(job: subprocess.Popen[bytes]) -> None:
    """Kill all that a job has started."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)


def script(start: Start) -> str:
    """The shell script of a job."""
    return str(
        jobqueue("local")
        .LocalJob(**{k: v for k, v in launcher_options(start).items() if k != "shebang"})
        .job_script()
    ).strip()
