"""HTCondor: jobs by ``condor_submit``, one submission for several; states by one ``condor_q``."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dask_pcm.errors import PoolError
from dask_pcm.pools.batch import JobState, Start, call, jobqueue, launcher_options, log_of

logger = logging.getLogger(__name__)

#: Values of ``JobStatus``. A job whose output is transferred still has its node, and may have been
#: evicted: then it is queued again.
_RUNNING, _REMOVED, _COMPLETED, _HELD, _TRANSFERRING, _SUSPENDED = 2, 3, 4, 5, 6, 7
_OVER = frozenset({_REMOVED, _COMPLETED})
_WITH_NODE = frozenset({_RUNNING, _TRANSFERRING, _SUSPENDED})
_ATTRIBUTES = "ClusterId,ProcId,JobStatus,HoldReason,LastRejMatchReason"
#: What ``condor_submit -terse`` says: the first and the last job, as cluster and process.
_SUBMITTED = re.compile(r"^(\d+)\.(\d+) - (\d+)\.(\d+)$", re.MULTILINE)
#: ``condor_rm`` says so of a job that has left the queue.
_GONE = re.compile(r"(?i)job \S+ (not found|already marked for removal)")


class HTCondor:
    """The HTCondor that this machine's commands talk to; see ``BatchSystem``.

    Ids are HTCondor's own, cluster and process: ``123.0``. HTCondor queues jobs again that it has
    evicted, under the same id.
    """

    can_exclude = True

    async def check(self, start: Start) -> None:
        """See ``BatchSystem``; by a dry run of the submit file, and by asking the queue.

        Whether any machine matches is not known before HTCondor has tried.
        """
        with _submit_file(start, 1) as path:
            await call("condor_submit", "-dry-run", "/dev/null", path)
        await call("condor_q", "-totals")

    async def submit(self, start: Start, n_jobs: int) -> list[str]:
        """See ``BatchSystem``."""
        ids: list[str] = []
        while len(ids) < n_jobs:
            n = n_jobs if start.pool.is_array else 1
            try:
                with _submit_file(start, n) as path:
                    ids += _ids_in(await call("condor_submit", "-terse", path))
            except PoolError as error:
                if not ids:  # otherwise those are known, and the rest is tried again
                    raise
                logger.warning("%s of %s jobs were submitted: %s", len(ids), n_jobs, error)
                break
        return ids

    async def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        """See ``BatchSystem``."""
        clusters = sorted({job.partition(".")[0] for job in jobs}, key=int)
        said = await call("condor_q", *clusters, "-json", "-attributes", _ATTRIBUTES)
        found = {}
        for one in _ads_in(said):
            job = f"{one.get('ClusterId')}.{one.get('ProcId')}"
            status = one.get("JobStatus")
            if job in jobs and status not in _OVER:
                found[job] = JobState(status in _WITH_NODE, _reason(one))
        return found

    async def cancel(self, jobs: Sequence[str]) -> None:
        """See ``BatchSystem``."""
        if not jobs:
            return
        try:
            await call("condor_rm", *jobs)
        except PoolError as error:  # it cancels the others all the same
            lines = str(error).removeprefix("condor_rm:").splitlines()
            if not all(_GONE.search(line) for line in lines if line.strip()):
                raise

    def log(self, start: Start, job: str) -> Path:
        """See ``BatchSystem``."""
        return log_of(start, job)

    def close(self) -> None:
        """See ``BatchSystem``."""


def _ids_in(said: str) -> list[str]:
    """The jobs that condor_submit says it has submitted."""
    found = _SUBMITTED.search(said)
    if found is None or found[1] != found[3]:
        raise PoolError(f"condor_submit said {said.strip()!r:.80}; expected the ids of jobs.")
    return [f"{found[1]}.{k}" for k in range(int(found[2]), int(found[4]) + 1)]


def _ads_in(said: str) -> list[dict[str, Any]]:
    """The jobs that condor_q says are in the queue; it says nothing if there are none."""
    try:
        found = json.loads(said) if said.strip() else []
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise PoolError(f"condor_q said {said.strip()!r:.80}; expected a list of jobs as JSON.")
    return found


def _reason(ad: dict[str, Any]) -> str:
    """Why a job waits, in HTCondor's own words."""
    if ad.get("JobStatus") == _HELD:
        why = str(ad.get("HoldReason", "")).strip()
        return f"held: {why}" if why else "held"
    return (
        "" if ad.get("JobStatus") in _WITH_NODE else str(ad.get("LastRejMatchReason", "")).strip()
    )


@contextmanager
def _submit_file(start: Start, n_jobs: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"pcm-{start.name}.sub")
        path.write_text(script(start, n_jobs), encoding="utf-8")
        yield str(path)


def script(start: Start, n_jobs: int = 1) -> str:
    """The submit file of jobs of a pool, as dask-jobqueue writes it.

    Raises
    ------
    PoolError
        The pool has something that HTCondor has not.
    """
    options = launcher_options(start)
    options["job_script_prologue"] = [
        "exec 2>&1",  # HTCondor's own output and error would overwrite each other in one file
        "export PCM_JOB_ID=$(ClusterId).$(ProcId)",
        *map(_in_one_line, options["job_script_prologue"]),
    ]
    for name in ("python", "local_directory"):
        options[name] = options[name] and _literal(options[name])
    options["worker_extra_args"] = [_literal(one) for one in options["worker_extra_args"]]
    options["job_extra_directives"] = _directives(start)
    # In place of dask-jobqueue's, which HTCondor computes from attributes of its own.
    options["job_directives_skip"] = [
        *("MY.DaskWorkerName", "MY.JobId", "MY.DaskWorkerCores", "MY.DaskWorkerMemory"),
        *("MY.DaskWorkerDisk", "RequestCpus", "RequestMemory", "RequestDisk", "batch_name"),
    ]
    # The disk that a site gives by default, unless the directives say how much.
    job = jobqueue("htcondor").HTCondorJob(disk="1 GiB", **options)
    job.executable = "/bin/bash"
    return str(job.job_script()).removesuffix("Queue\n") + f"Queue {n_jobs}\n"


def _directives(start: Start) -> dict[str, str]:
    """The lines of the submit file; a user's own take the place of ours."""
    pool = start.pool
    if pool.nodes_per_job > 1:
        raise PoolError("Jobs of several nodes are built for Slurm only.")
    if pool.queue is not None:
        raise PoolError(
            "HTCondor has no queues. Leave queue out, and say which machines"
            " in directives, such as 'requirements = TARGET.Pool == \"gpus\"'."
        )
    lines = {
        "batch_name": f"pcm-{start.name}",
        "accounting_group": pool.account,
        "request_cpus": str(pool.cores),
        "request_memory": f"{math.ceil(pool.memory_bytes / 2**20)}MB"
        if pool.mem != "none"
        else None,
        "request_gpus": str(pool.gpus_per_job) if pool.gpus_per_job else None,
        "require_gpus": f'DeviceName == "{pool.gpu_type}"' if pool.gpu_type else None,
        "transfer_executable": "False",
        "output": str(log_of(start, "$(ClusterId).$(ProcId)")),
        "stream_output": "True",  # otherwise it may be transferred at the end
        # After SIGTERM, at an eviction or a removal, unless the machine gives less.
        "job_max_vacate_time": f"{math.ceil(pool.notice_s)}",
    }
    if pool.walltime_s is not None:
        runs_s = math.ceil(pool.walltime_s - pool.warned_s)
        runs = "time() - EnteredCurrentStatus"
        lines["periodic_remove"] = f"JobStatus == {_RUNNING} && {runs} > {runs_s}"
    given = dict(_directive(start.name, line) for line in pool.directives)
    own = {name.lower().replace("_", "") for name in given}
    kept = {k: v for k, v in lines.items() if v is not None and k.replace("_", "") not in own}
    return {**kept, **_requirements(start, given)}


def _requirements(start: Start, given: Mapping[str, str]) -> dict[str, str]:
    """A user's lines, with the nodes that are excluded in their requirements."""
    name = next((one for one in given if one.lower() == "requirements"), "requirements")
    terms = [f"({given[name]})"] if given.get(name) else []
    terms += [f'TARGET.Machine =!= "{node}"' for node in start.excluded]
    return {**given, name: " && ".join(terms)} if start.excluded else dict(given)


def _directive(name: str, line: str) -> tuple[str, str]:
    """A line of a submit file that a user gives, as its name and its value."""
    key, sign, value = (part.strip() for part in line.partition("="))
    if not sign or not re.fullmatch(r"\+?[A-Za-z_][\w.]*", key) or "\n" in line:
        raise PoolError(
            f"The directive {line!r:.80} is no line of a submit file; expected one"
            " such as 'request_disk = 20GB'."
        )
    return key, value


def _in_one_line(command: str) -> str:
    """A shell command, as a part of one line of shell commands in a submit file."""
    if "\n" in command:
        raise PoolError(
            f"The prologue has a command of several lines, {command!r:.80}; HTCondor takes none."
            " Give one command a line, or a script of your own to be sourced."
        )
    # What comes after a comment would be part of it.
    return _literal(f"eval {shlex.quote(command)}" if "#" in command else command)


def _literal(text: str) -> str:
    """A text as HTCondor leaves it: it has macros of its own behind a dollar."""
    return text.replace("$", "$(DOLLAR)")
