"""The jobs of all pools, at the batch systems that they belong to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dask_pcm.errors import PoolError
from dask_pcm.pools.batch import BatchSystem, JobState, Start
from dask_pcm.pools.connection import Connection, home
from dask_pcm.pools.htcondor import HTCondor
from dask_pcm.pools.local import Local
from dask_pcm.pools.pbs import PBS
from dask_pcm.pools.pool import Pool
from dask_pcm.pools.slurm import Slurm

logger = logging.getLogger(__name__)

_SYSTEMS: Mapping[str, Callable[[], BatchSystem]] = {
    "slurm": Slurm,
    "pbs": PBS,
    "htcondor": HTCondor,
    "local": Local,
}
#: Stands for the scheduler's address while there is no scheduler yet.
_SOME_ADDRESS = "tls://127.0.0.1:8786"
#: The last lines of a job's output that are shown.
_N_LINES = 15


class Jobs:
    """Submits, follows and cancels the jobs of pools; for the cluster's event loop.

    Parameters
    ----------
    pools
        Pools by name.
    connection
        The cluster's files.
    """

    def __init__(self, pools: Mapping[str, Pool], connection: Connection) -> None:
        self._pools = pools
        self._connection = connection
        #: What systems that do not answer have said last, by batch system.
        self.silence: dict[str, str] = {}
        self._systems = {one: _SYSTEMS[one]() for one in {p.batch for p in pools.values()}}

    async def check(self) -> None:
        """Raise PoolError if a batch system would refuse the jobs of a pool."""
        for name in self._pools:
            try:
                await self._system(name).check(self._start(name, _SOME_ADDRESS))
            except PoolError as error:
                raise PoolError(f"Pool {name!r}: {error}") from error

    async def submit(
        self, name: str, address: str, n_jobs: int, excluded: Collection[str] = ()
    ) -> list[str]:
        """Submit jobs of a pool for the scheduler at `address`; return their ids.

        See ``Start`` for `excluded`.
        """
        start = replace(self._start(name, address), excluded=tuple(sorted(excluded)))
        ids = await self._system(name).submit(start, n_jobs)
        self._connection.note_jobs(self._pools[name].batch, ids)
        return ids

    async def cancel_left(self) -> None:
        """Cancel jobs of clusters whose process was killed; most of them are over."""
        left: dict[str, list[str]] = {}
        for batch, job in self._connection.left:
            left.setdefault(batch, []).append(job)
        for batch in left.keys() & _SYSTEMS.keys():
            try:
                await _SYSTEMS[batch]().cancel(left[batch])
            except PoolError as error:
                logger.debug("Of jobs that a killed cluster has left: %s", error)

    async def states(
        self, jobs: Mapping[str, Collection[str]]
    ) -> dict[str, Mapping[str, JobState]]:
        """The states of jobs, given and returned by pool; without pools whose system is silent.

        One query for all pools of a batch system.
        """
        found: dict[str, Mapping[str, JobState]] = {}
        for batch, system in self._systems.items():
            names = [name for name in jobs if self._pools[name].batch == batch]
            ids = {job for name in names for job in jobs[name]}
            if not ids:
                self.silence.pop(batch, None)
                continue
            try:
                states = await system.states(ids)
            except PoolError as error:  # what is not known is not gone
                if str(error) != self.silence.get(batch):
                    logger.warning("%s", error)
                self.silence[batch] = str(error)
                continue
            self.silence.pop(batch, None)
            found.update(dict.fromkeys(names, states))
        return found

    def can_exclude(self, name: str) -> bool:
        """Whether jobs of a pool can be kept from nodes; see ``BatchSystem``."""
        return self._system(name).can_exclude

    async def cancel(self, name: str, jobs: Sequence[str]) -> None:
        """Cancel jobs of a pool."""
        try:
            await self._system(name).cancel(jobs)
        except PoolError as error:
            names = ", ".join(jobs)
            logger.warning("Pool %s: jobs %s may go on: %s", name, names, error)

    def output(self, name: str, job: str) -> str:
        """The last lines of a job's output, or what became of it."""
        path = self.log(name, job)
        try:
            lines = path.read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return (
                f"(there is none in {path.parent}: either it was cancelled while it waited, or the"
                " nodes do not share this folder)"
            )
        except OSError as error:
            return f"({path}: {error.strerror})"
        return "\n".join(lines[-_N_LINES:]) or f"({path} is empty)"

    def log(self, name: str, job: str) -> Path:
        """The file with the output of a job."""
        return self._system(name).log(self._start(name, _SOME_ADDRESS), job)

    async def close(self) -> None:
        """The cluster is closed, and its jobs are cancelled."""
        for system in self._systems.values():
            try:
                await asyncio.to_thread(system.close)
            except RuntimeError:  # Python ends, and starts no thread any more
                system.close()

    def _start(self, name: str, address: str) -> Start:
        pool = self._pools[name]
        logs = Path(pool.log_directory).expanduser() if pool.log_directory else home() / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PoolError(
                f"The folder for the output of jobs, {str(logs)!r}, cannot be made:"
                f" {error.strerror}."
            ) from error
        return Start(address, name, pool, self._connection.tls, logs)

    def _system(self, name: str) -> BatchSystem:
        return self._systems[self._pools[name].batch]
