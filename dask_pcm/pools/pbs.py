"""PBS: jobs by ``qsub``, as one array where there are several; states by one ``qstat``."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from dask_pcm.errors import PoolError
from dask_pcm.pools.batch import JobState, Start, call, jobqueue, launcher_options

logger = logging.getLogger(__name__)

#: Letters of states: held, queued, waiting for its time, moving; those of jobs with nodes; and
#: exiting: the output is copied to where it belongs.
_WAITING, _RUNNING, _ENDING = frozenset("HQWT"), frozenset("RSU"), "E"
_WHY = {"H": "held", "W": "waiting for its time"}
#: "123.server", "123[].server" and "123[4].server"; a server's name may be cut in a listing.
_ID = re.compile(r"(\d+)(\[\d*\])?(\..*)?$")


class PBS:
    """The PBS that this machine's commands talk to; see ``BatchSystem``.

    Ids are without the server's name: ``123``, and ``123[4]`` for the element of an array.
    """

    can_exclude = False

    async def check(self, start: Start) -> None:
        """See ``BatchSystem``; PBS cannot be asked without submitting: a job that is held, and
        deleted at once.
        """
        if ids := await self._submit(start, 1, "-h"):
            await self.cancel(ids)

    async def submit(self, start: Start, n_jobs: int) -> list[str]:
        """See ``BatchSystem``."""
        if start.pool.is_array:
            return await self._submit(start, n_jobs)
        ids: list[str] = []
        while len(ids) < n_jobs:
            try:
                ids += await self._submit(start, 1)
            except PoolError as error:
                if not ids:
                    raise
                logger.warning("%s of %s jobs were submitted: %s", len(ids), n_jobs, error)
                break
        return ids

    async def _submit(self, start: Start, n_jobs: int, *options: str) -> list[str]:
        # PBS refuses arrays that are not rerunnable; options take precedence over the script's.
        array = ["-r", "y", "-J", f"0-{n_jobs - 1}"] if n_jobs > 1 else []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"pcm-{start.name}.sh")
            path.write_text(script(start), encoding="utf-8")
            # Output goes to where it is submitted from, under PBS's own names.
            said = await call("qsub", *options, *array, str(path), folder=start.logs)
        found = _ID.match(said.strip())
        if found is None:
            raise PoolError(f"qsub said {said.strip()!r:.80}; expected the id of a job.")
        return [f"{found[1]}[{k}]" for k in range(n_jobs)] if n_jobs > 1 else [found[1]]

    async def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        """See ``BatchSystem``."""
        # -t: the elements of arrays, too.
        is_array = any("[" in job for job in jobs)
        said = await call("qstat", *(["-t"] if is_array else []))
        found = {}
        for line in said.splitlines():
            words = line.split()
            job = _ID.match(words[0]) if len(words) > 4 else None
            state = words[-2] if job is not None else ""
            name = f"{job[1]}{job[2] or ''}" if job is not None else ""
            if name in jobs and state == _ENDING:
                found[name] = JobState(True, is_ending=True)
            elif name in jobs and state in _WAITING | _RUNNING:
                found[name] = JobState(state in _RUNNING, _WHY.get(state, ""))
        return found

    async def cancel(self, jobs: Sequence[str]) -> None:
        """See ``BatchSystem``."""
        refused: list[PoolError] = []
        for job in jobs:  # one by one: qdel ends at the first that is over already
            try:
                await call("qdel", job)
            except PoolError as error:
                if not re.search("(?i)unknown|finished|invalid job", str(error)):
                    refused.append(error)
        if refused:
            raise refused[0]

    def log(self, start: Start, job: str) -> Path:
        """See ``BatchSystem``; PBS has names of its own."""
        number, _, element = job.rstrip("]").partition("[")
        return start.logs / f"pcm-{start.name}.o{number}{f'.{element}' if element else ''}"

    def close(self) -> None:
        """See ``BatchSystem``."""


def script(start: Start) -> str:
    """The job script of a pool, as dask-jobqueue writes it."""
    pool, options = start.pool, launcher_options(start)
    skipped = [] if pool.walltime_s is not None else ["-l walltime"]
    given = [one for one in pool.directives if "select=" in one]
    if pool.gpu_type and not given:
        raise PoolError(
            "PBS has no common name for the GPU model. Leave gpu_type out,"
            " and give the site's own in directives, such as"
            " '-l select=1:ncpus=4:ngpus=1:gpu_type=a10'."
        )
    if pool.nodes_per_job > 1:
        raise PoolError("Jobs of several nodes are built for Slurm only.")
    if given:
        skipped.append("-l select")
    options["job_extra_directives"] = ["-r n", "-j oe", *pool.directives]
    options["job_directives_skip"] = skipped
    job = jobqueue("pbs").PBSJob(
        queue=pool.queue,
        account=pool.account,
        resource_spec=_select(start),
        walltime=pool.clock,
        **options,
    )
    return str(job.job_script())


def _select(start: Start) -> str:
    """What a job takes; memory last, as Slurm's qsub reads nothing behind it."""
    pool = start.pool
    parts = ["select=1", f"ncpus={pool.cores}"]
    if pool.gpus_per_job:
        parts.append(f"ngpus={pool.gpus_per_job}")
    if pool.mem != "none":
        parts.append(f"mem={math.ceil(pool.memory_bytes / 2**20)}MB")
    return ":".join(parts)
