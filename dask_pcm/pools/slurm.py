"""Slurm: jobs by ``sbatch``, as one array where there are several; states by one ``squeue``."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dask_pcm.errors import PoolError
from dask_pcm.pools.batch import JobState, Start, call, jobqueue, launcher_options, log_of

logger = logging.getLogger(__name__)

#: Options that ask for GPUs, in the user's own words.
_ASKS_GPUS = re.compile(r"(-G\b|--gpus\b(?!-)|--gpus-per-\w+|--gres[= ].*gpu)")
#: What a job gets besides; of several such lines, sbatch takes the last.
_GRES = re.compile(r"--gres[= ]\s*(.+)")
#: Nodes that jobs are not to run on.
_EXCLUDES = re.compile(r"(?:--exclude[= ]|-x)\s*(.+)")
#: What a directive must not ask for, and why.
_REFUSED = (
    (r"-M|--clusters?\b", "its jobs could not be followed; start the pools on that cluster"),
    (r"--requeue\b", "the cluster submits again what has ended"),
    (r"-a|--array\b", "the cluster says how many jobs there are"),
    (r"-W|--wait\b(?!-)", "sbatch would wait for the job's end"),
    (r"-N|--nodes\b", "use nodes_per_job"),
)
#: ``MaxArraySize`` is 1,001 by default, and elements count from 0.
_MAX_ARRAY = 1000
#: States of jobs that are over, or are about to be; preempted jobs end in any of several.
_OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED"
    " REVOKED TIMEOUT".split()
)
#: What sbatch says if it may have submitted the job, and has not learned of it.
_UNSURE = re.compile("(?i)timed out|not answered|connect|contact|communication|zero bytes")
#: Then it is looked for until Slurm has answered twice, this long apart, or has not for as long.
_N_ANSWERS, _N_ASKED, _ASKED_S = 2, 6, 10.0
_RUNNING = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"})


class Slurm:
    """The Slurm that this machine's commands talk to; see ``BatchSystem``."""

    can_exclude = True

    async def check(self, start: Start) -> None:
        """See ``BatchSystem``; by ``sbatch --test-only``, which submits nothing."""
        with _script_file(start) as path:
            await call("sbatch", "--test-only", path)

    async def submit(self, start: Start, n_jobs: int) -> list[str]:
        """See ``BatchSystem``."""
        ids: list[str] = []
        with _script_file(start) as path:
            while len(ids) < n_jobs:
                n = min(n_jobs - len(ids), _MAX_ARRAY) if start.pool.is_array else 1
                output = f"--output={log_of(start, '%A_%a' if n > 1 else '%j')}"
                options = [f"--array=0-{n - 1}"] if n > 1 else []
                if start.excluded:  # in place of what the script excludes
                    matches = [_EXCLUDES.match(one.strip()) for one in start.pool.directives]
                    excluded = [found[1] for found in matches if found]
                    options.append(f"--exclude={','.join([*excluded, *start.excluded])}")
                try:
                    job = await _submitted(path, output, *options)
                except PoolError as error:
                    if not ids:  # otherwise those are known, and the rest is tried again
                        raise
                    logger.warning("%s of %s jobs were submitted: %s", len(ids), n_jobs, error)
                    break
                ids += [f"{job}_{k}" for k in range(n)] if n > 1 else [job]
        return ids

    async def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        """See ``BatchSystem``."""
        said = await call("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r")
        found = {}
        for line in said.splitlines():
            job, state, reason = [*line.strip().split("|", 2), "", ""][:3]
            if job in jobs and state not in _OVER:
                found[job] = JobState(state in _RUNNING, "" if reason == "None" else reason)
        return found

    async def cancel(self, jobs: Sequence[str]) -> None:
        """See ``BatchSystem``."""
        if jobs:
            await call("scancel", "--quiet", *jobs)

    def log(self, start: Start, job: str) -> Path:
        """See ``BatchSystem``."""
        return log_of(start, job)

    def close(self) -> None:
        """See ``BatchSystem``."""


async def _submitted(path: str, *options: str) -> str:
    """Submit a script; return the id of its job.

    A busy Slurm accepts jobs whose ``sbatch`` has given up by then. So the job is looked for by its
    script, whose folder no other submission has: a job that the cluster does not know would never
    be cancelled.
    """
    try:
        return _id_in(await call("sbatch", "--parsable", *options, path))
    except PoolError as error:
        if not _UNSURE.search(str(error)):
            raise
        unsure = error
    n_answers = 0
    for k in range(_N_ASKED):
        await asyncio.sleep(_ASKED_S if k else 0.0)
        try:
            said = await call("squeue", "--me", "--noheader", "--format=%F|%o")
        except PoolError:
            continue
        n_answers += 1
        found = [line.split("|")[0].strip() for line in said.splitlines() if path in line]
        if found:
            return found[0]
        if n_answers == _N_ANSWERS:
            break
    raise unsure


def _id_in(said: str) -> str:
    """The job that sbatch says it has submitted."""
    job = said.strip().split(";")[0]  # "123;cluster" on federated sites
    if not job.isdigit():
        raise PoolError(f"sbatch said {said.strip()!r:.80}; expected the id of a job.")
    return job


@contextmanager
def _script_file(start: Start) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="pcm-") as folder:
        path = os.path.join(folder, f"pcm-{start.name}.sh")
        with open(path, "w", encoding="utf-8") as file:
            file.write(script(start))
        yield path


def script(start: Start) -> str:
    """The job script of a pool, as dask-jobqueue writes it."""
    pool, options = start.pool, launcher_options(start)
    # The cluster submits what is missing, and only the cluster. The notice goes to the job's own
    # process (B), also where a preemption sends it at once (preempt_send_user_signal).
    lines = ["--no-requeue", f"--signal=B:USR1@{math.ceil(pool.warned_s)}"]
    skipped = ["--mem="] if pool.mem != "total" else []
    skipped += ["-t "] if pool.walltime_s is None else []  # dask-jobqueue has a default of its own
    if pool.mem == "per-cpu":
        lines.append(f"--mem-per-cpu={math.ceil(pool.memory_bytes / 2**20 / pool.cores)}M")
    elif pool.mem == "per-gpu":
        lines.append(f"--mem-per-gpu={math.ceil(pool.memory_bytes / 2**20 / pool.gpus_per_job)}M")
    directives = list(pool.directives)
    for one in directives:
        for pattern, why in _REFUSED:
            if re.match(pattern, one.strip()):
                raise PoolError(f"Leave the directive {one!r} out: {why}.")
    if pool.gpus_per_job and not any(_ASKS_GPUS.match(one.strip()) for one in directives):
        kind = f"{pool.gpu_type}:" if pool.gpu_type else ""
        besides = [found[1].strip() for one in directives if (found := _GRES.match(one.strip()))]
        directives = [one for one in directives if not _GRES.match(one.strip())]
        lines.append(f"--gres={','.join([f'gpu:{kind}{pool.gpus_per_job}', *besides])}")
    if pool.nodes_per_job > 1:
        skipped.append("-n 1")
        lines += [f"--nodes={pool.nodes_per_job}", "--ntasks-per-node=1"]
        # Only a step runs on all nodes; a batch script runs on the first. Since 22.05 a step does
        # not inherit the job's cores per task.
        srun = f"exec srun --kill-on-bad-exit=0 --cpus-per-task={pool.cores} "
        options["python"] = options["python"].replace("exec ", srun, 1)
    options["job_extra_directives"] = [*lines, *directives]
    options["job_directives_skip"] = skipped
    job = jobqueue("slurm").SLURMJob(
        queue=pool.queue, account=pool.account, walltime=pool.clock, **options
    )
    return str(job.job_script())
