"""What a cluster needs of a batch system: submit jobs, ask what became of them, cancel them."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import dask

from dask_pcm.config import Config
from dask_pcm.errors import PoolError
from dask_pcm.pools.pool import Pool

#: A command of a batch system that takes longer is given up: its server does not answer.
_COMMAND_S = 60.0
#: What a surrounding job sets, or a user for a terminal: commands would take it for options.
_OF_JOB = (
    *("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "PBS_", "PCM_JOB_ID", "_CHIRP_"),
    # Other names that begin with _CONDOR_ are settings, for instance where the queue is.
    *("_CONDOR_JOB_", "_CONDOR_MACHINE_AD", "_CONDOR_SCRATCH_DIR", "_CONDOR_SLOT", "_CONDOR_BIN"),
    *("_CONDOR_ANCESTOR_", "_CONDOR_Assigned", "_CONDOR_CHIRP_", "_CONDOR_CREDS"),
)
#: Says which configuration the batch system's commands use.
_OF_SITE = frozenset({"SLURM_CONF", "PBS_CONF_FILE", "PBS_EXEC", "PBS_HOME", "PBS_SERVER"})


@dataclass(frozen=True, slots=True)
class JobState:
    """What a batch system says of a job that it knows.

    Attributes
    ----------
    is_running
        Whether it has its nodes; otherwise it waits.
    reason
        Why it waits, in the system's own words.
    is_ending
        Whether its processes are ended, or have been, and its output may not be there yet.
    """

    is_running: bool
    reason: str = ""
    is_ending: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """What all jobs of a pool start with.

    Attributes
    ----------
    address
        The scheduler's address.
    name, pool
        The pool.
    tls
        Files of the certificates, by option of ``dask worker``; empty without TLS.
    logs
        The folder for the output of jobs.
    excluded
        Nodes that jobs are not to run on, where the batch system can be told so.
    """

    address: str
    name: str
    pool: Pool
    tls: Mapping[str, str]
    logs: Path
    excluded: tuple[str, ...] = ()


class BatchSystem(Protocol):
    """A batch system, for the cluster's event loop. Errors are ``PoolError`` with its own words.

    Attributes
    ----------
    can_exclude
        Whether it can be told of nodes that jobs are not to run on.
    """

    can_exclude: bool

    async def check(self, start: Start) -> None:
        """Ask whether the jobs of a pool would be accepted."""

    async def submit(self, start: Start, n_jobs: int) -> list[str]:
        """Submit jobs, as one request where the system can; return their ids."""

    async def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        """The state of each of `jobs`, asked in one query; one that is missing is over."""

    async def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs; those that are over already are none of its errors."""

    def log(self, start: Start, job: str) -> Path:
        """The file with the output of a job."""

    def close(self) -> None:
        """The cluster is closed; its jobs were cancelled before."""


def launcher_options(start: Start) -> dict[str, Any]:
    """Parameters of dask-jobqueue's jobs for those of a pool, whichever the batch system.

    The launcher is the process of the job (``exec``): it alone gets the batch system's signals.
    """
    pool = start.pool
    python = pool.python or shlex.quote(sys.executable)
    launcher = ["--pool", start.name, "--workers", str(pool.workers_per_node)]
    launcher += [f"{option} {shlex.quote(value)}" for option, value in start.tls.items()]
    return {
        "scheduler": start.address,
        "name": start.name,
        "cores": pool.cores,
        "memory": f"{pool.memory_bytes} B",
        "processes": 1,
        "job_name": f"pcm-{start.name}",
        "python": f"exec {python}",
        "worker_command": "dask_pcm.pools.launcher",
        "worker_extra_args": [*launcher, *_ports(pool), *_worker_args(pool)],
        "local_directory": None if pool.scratch is None else _quoted(pool.scratch),
        "log_directory": None,  # each batch system's way of submitting says where the output goes
        "death_timeout": 60,
        "nanny": True,
        "interface": None,
        "job_script_prologue": [*_exports(start), *pool.prologue],
        "job_extra_directives": [],
        "job_directives_skip": [],
        "shebang": "#!/usr/bin/env bash",
    }


def log_of(start: Start, job: str) -> Path:
    """The file with the output of a job."""
    return start.logs / f"pcm-{start.name}-{job}.out"


def _exports(start: Start) -> list[str]:
    """Settings of the workers' own job, as lines of a shell script."""
    pool = start.pool
    n_devices = pool.gpus_per_worker if pool.gpus_per_job else 1
    values = {
        "WORKER__POOL": start.name,
        "WORKER__DEVICE": pool.device,
        "WORKER__DEVICES": f"{n_devices}" if n_devices > 1 else None,
        "WORKER__WALLTIME": None if pool.walltime_s is None else f"{pool.walltime_s:.0f}s",
        "WORKER__IMPORTS": repr(list(Config.read().imports)),
        "LADDER__DEVICE__BUDGET": None if pool.device_bytes is None else f"{pool.device_bytes}",
        "LADDER__TRANSFER__PORTS": pool.ports,
    }
    texts = {key: shlex.quote(value) for key, value in values.items() if value is not None}
    return [f"export DASK_PCM__{key}={text}" for key, text in texts.items()]


def _ports(pool: Pool) -> list[str]:
    """Options of ``dask worker``: it and its nanny each take the first free port of a range."""
    return (
        [] if pool.ports is None else [f"--{one}-port {pool.ports}" for one in ("worker", "nanny")]
    )


def _worker_args(pool: Pool) -> list[str]:
    """A user's options of ``dask worker``, for a shell; an option may have its value with it."""
    words = [
        word
        for one in pool.worker_args
        for word in (shlex.split(one) if one.startswith("-") else [one])
    ]
    return list(map(shlex.quote, words))


def _quoted(path: str) -> str:
    """A path for a shell, which fills in environment variables, the home and nothing else.

    >>> _quoted("$TMPDIR/my dask"), _quoted("$(date)")
    ('"$TMPDIR/my dask"', '"\\\\$(date)"')
    """
    if path.startswith("~/"):
        path = f"$HOME{path[1:]}"
    if "$" not in path:
        return shlex.quote(path)
    text = re.sub(r'(["\\`]|\$(?=\())', r"\\\1", path)
    return f'"{text}"'


async def call(*command: str, folder: Path | None = None) -> str:
    """Run a command of a batch system, in a folder; return what it prints.

    Raises
    ------
    PoolError
        It fails, is missing, or does not answer within a minute.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=scrubbed(os.environ),
            cwd=folder,
        )
    except OSError as error:
        raise PoolError(
            f"{command[0]} cannot be run on this machine: {error.strerror}. Start the cluster where"
            " jobs are submitted, on a login node."
        ) from error
    try:
        out, said = await asyncio.wait_for(process.communicate(), _COMMAND_S)
    except TimeoutError as error:
        process.kill()
        raise PoolError(f"{command[0]} has not answered within {_COMMAND_S:.0f} s.") from error
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode:
        words = (said or out).decode(errors="replace").strip()
        raise PoolError(f"{command[0]}: {words or f'ended with code {process.returncode}'}")
    return out.decode(errors="replace")


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a surrounding job has set in it."""
    return {
        key: value
        for key, value in environ.items()
        if key in _OF_SITE or not key.startswith(_OF_JOB)
    }


def jobqueue(module: str) -> Any:
    """Import a module of dask_jobqueue, which replaces the handler of SIGINT by ``sys.exit``.

    The handler stays as it was; on other threads than the main one, which may not set any, the
    import would fail.
    """
    before = signal.signal
    signal.signal = lambda signalnum, handler: signal.getsignal(signalnum)
    try:
        found = importlib.import_module(f"dask_jobqueue.{module}")
    finally:
        signal.signal = before
    # Its jobs read settings that it registers once, and that a user may have reset since.
    if "jobqueue" not in dask.config.config:
        importlib.import_module("dask_jobqueue.config").reconfigure()
    return found
