"""A Dask cluster of pools: it submits jobs, replaces those that end and gives back idle ones."""

from __future__ import annotations

import asyncio
import html
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed import Scheduler, Security
from distributed.core import Status
from distributed.deploy.spec import SpecCluster
from distributed.utils import NoOpAwaitable

from dask_pcm.config import Config
from dask_pcm.errors import PoolError
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.pools.batch import BatchSystem, Start, log_of
from dask_pcm.pools.connection import Connection, home
from dask_pcm.pools.fleet import Fleet, Job
from dask_pcm.pools.local import Local
from dask_pcm.pools.pool import pools_of
from dask_pcm.pools.slurm import Slurm
from dask_pcm.scheduling.rules.scaling import needed_workers, spread

logger = logging.getLogger(__name__)

_SYSTEMS: Mapping[str, Callable[[], BatchSystem]] = {"slurm": Slurm, "local": Local}
#: Between two looks at workers and wishes; and the last lines of a job's output that are shown.
_LOOK_S, _N_LINES = 0.25, 15
#: What the workers have to end when the cluster closes.
_END_S = 5.0
#: A worker that is told to leave has this long to hand over its results.
_RETIRE_S = 30.0


class PoolCluster(SpecCluster):  # type: ignore[misc] # untyped
    """Workers of several kinds of jobs, on one scheduler in this process.

    A job that ends, for whatever reason, is replaced: at the batch system's notice, where it gives
    one, otherwise as soon as its workers are gone. The scheduler has the toolkit's plugins.

    Parameters
    ----------
    pools
        Pools by name, or a YAML file with a section ``pools``.
    host, interface, port
        Where workers reach the scheduler; Dask's defaults.
    dashboard_address
        Where the dashboard listens: on this machine alone, unless another address is given.
    security
        True for temporary certificates, which TLS needs; False for none; or your own.
    name
        The cluster's name.
    asynchronous, loop, silence_logs
        See ``distributed.LocalCluster``.

    Raises
    ------
    PoolError
        A pool is wrong, or its batch system would refuse its jobs.

    Examples
    --------
    >>> cluster = PoolCluster({"cpu": Pool(batch="local")})  # doctest: +SKIP
    >>> cluster.scale({"cpu": 2})  # doctest: +SKIP
    """

    def __init__(
        self,
        pools: Mapping[str, Any] | str | os.PathLike[str],
        *,
        host: str | None = None,
        interface: str | None = None,
        port: int = 0,
        dashboard_address: str | None = "127.0.0.1:0",
        security: bool | Security = True,
        name: str | None = None,
        asynchronous: bool = False,
        loop: Any = None,
        silence_logs: Any = logging.WARNING,
    ) -> None:
        self.pools = pools_of(pools)
        self._poll_s = Config.read().poll_s
        self._fleets = {name: Fleet(name, pool) for name, pool in self.pools.items()}
        self._systems = {one: _SYSTEMS[one]() for one in {p.batch for p in self.pools.values()}}
        if security is True:
            security = Security.temporary()
        self._connection = Connection.make(name or "cluster", security or None)
        self._targets: dict[str, int] = dict.fromkeys(self.pools, 0)
        self._limits: tuple[dict[str, int], dict[str, float], float] | None = None
        self._submitting: dict[str, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._polled_at = -math.inf
        self._keeper: asyncio.Task[None] | None = None
        options = {
            "host": host,
            "interface": interface,
            "port": port,
            "dashboard_address": dashboard_address,
            "protocol": "tls://" if security else None,
            "security": security or None,
            "preload": ["dask_pcm.preload"],
        }
        try:
            super().__init__(
                scheduler={"cls": Scheduler, "options": options},
                name=name,
                asynchronous=asynchronous,
                loop=loop,
                security=security or None,
                silence_logs=silence_logs,
            )
        except BaseException:
            self._connection.remove()
            raise

    # -- what users call ------------------------------------------------------------------------

    def scale(self, n: int | Mapping[str, int] = 0, memory: None = None, cores: None = None) -> Any:
        """Have as many workers, whatever work there is.

        Parameters
        ----------
        n
            Workers by pool; pools that are not named stay as they are. A number, if there is one
            pool only; 0 ends the jobs of all.
        """
        if memory is not None or cores is not None:
            raise PoolError("scale takes workers: cluster.scale({'a10': 4}).")
        self._targets.update(self._by_pool(n, "scale", float))
        self._limits = None
        return NoOpAwaitable() if self.asynchronous else None

    def adapt(
        self,
        minimum: int | Mapping[str, int] = 0,
        maximum: int | Mapping[str, int] | None = None,
        target_duration: str | float = "60s",
    ) -> None:
        """Have as many workers as the work is worth, and give back those that are idle.

        Parameters
        ----------
        minimum, maximum
            Workers by pool. A number as maximum is one for all pools together; None for as many as
            the pools allow.
        target_duration
            More workers are wanted while the known work takes longer than this, in seconds or as
            text.
        """
        from dask.utils import parse_timedelta

        most = dict.fromkeys(self.pools, math.inf)
        in_all = math.inf
        if isinstance(maximum, Mapping):
            most.update(self._by_pool(maximum, "adapt", float))
        elif maximum is not None:
            in_all = float(maximum)
        least = dict.fromkeys(self.pools, 0)
        least.update(self._by_pool(minimum, "adapt", int) if minimum else {})
        self._target_s = float(parse_timedelta(target_duration, "s"))
        self._limits = least, most, in_all

    @property
    def connection_file(self) -> str:
        """The file with which ``pcm.connect`` finds this cluster; only this user can read it."""
        return str(self._connection.file)

    @property
    def lack(self) -> str:
        """What the cluster waits for, in words; "" if nothing."""
        waiting = [
            str(fleet) for fleet in self._fleets.values() if fleet.n_waiting() or fleet.trouble
        ]
        return f"waiting for jobs: {'; '.join(waiting)}" if waiting else ""

    @property
    def plan(self) -> set[str]:
        """Names for the workers that are wanted."""
        return {f"{name}-{k}" for name, n in self._targets.items() for k in range(n)}

    @property
    def requested(self) -> set[str]:
        """Names for the workers of all jobs that were submitted."""
        return {
            f"{fleet.name}-{job.id}-{k}"
            for fleet in self._fleets.values()
            for job in fleet.jobs.values()
            for k in range(fleet.pool.workers_per_job)
        }

    @property
    def _supports_scaling(self) -> bool:
        return len(self.pools) == 1

    def _repr_html_(self, cluster_status: str | None = None) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{pool.batch}</td><td>{self._targets[name]}</td>"
            f"<td>{sum(len(j.workers) for j in fleet.jobs.values())}</td>"
            f"<td>{fleet.n_waiting()}</td><td>{html.escape(fleet.trouble.split(chr(10))[0])}</td></tr>"
            for (name, pool), fleet in zip(self.pools.items(), self._fleets.values(), strict=True)
        )
        heads = "".join(
            f"<th>{h}</th>" for h in ("pool", "batch", "wanted", "workers", "pending", "")
        )
        return str(super()._repr_html_(f"<table><tr>{heads}</tr>{rows}</table>"))

    # -- the cluster's loop ---------------------------------------------------------------------

    async def _start(self) -> None:
        if self.status == Status.created:
            for name in self.pools:
                await self._system(name).check(self._begin(name, "tls://127.0.0.1:8786"))
        await super()._start()
        self._connection.publish(self.scheduler.address)
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())

    async def _close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            # A submission is waited for: its jobs would be known to nobody.
            todo = [keeper, *self._submitting.values(), *self._retiring]
            await asyncio.gather(*todo, return_exceptions=True)
            await self._end_workers()
        try:
            await super()._close()
        finally:
            for name, fleet in self._fleets.items():
                await self._cancel(name, list(fleet.jobs))
            for system in self._systems.values():
                await asyncio.to_thread(system.close)
            self._connection.remove()

    async def _end_workers(self) -> None:
        """End the workers, and so most jobs; a signal would be a notice, which takes time."""
        message = {"op": "terminate", "reason": "cluster-closes"}
        told = self.scheduler.broadcast(msg=message, nanny=True, on_error="ignore")
        with suppress(TimeoutError):  # one that does not answer: its job is cancelled
            await asyncio.wait_for(told, _END_S)

    async def _keep(self) -> None:
        """Keep the jobs as they are wanted, until the cluster closes."""
        while True:
            try:
                await self._look()
            except Exception:
                logger.exception("The pools could not be looked after; trying again")
            await asyncio.sleep(_LOOK_S)

    async def _look(self) -> None:
        """Compare what there is with what is wanted; submit and cancel."""
        gate = self.scheduler.plugins.get(GATE)
        state = None if gate is None else gate.state
        noticed, needed = {}, set()
        busy = needed_workers(state, self.scheduler.workers) if state else set()
        for address, ws in self.scheduler.workers.items():
            view = state.workers.get(address) if state else None
            noticed[str(ws.name)] = view is not None and view.is_draining
            if address in busy or ws.processing:
                needed.add(str(ws.name))
        for fleet in self._fleets.values():
            fleet.sync(noticed, time.monotonic())
        await self._poll()
        if self._limits is not None:
            self._targets = self._worth(state)
        for name, fleet in self._fleets.items():
            is_adaptive = self._limits is not None
            steps = fleet.decide(self._targets[name], needed, is_adaptive, time.monotonic())
            if steps.cancel:
                jobs = [fleet.jobs[job] for job in steps.cancel]
                for job in jobs:
                    job.is_cancelled = True
                task = asyncio.create_task(self._retire(name, jobs))
                self._retiring.add(task)
                task.add_done_callback(self._retiring.discard)
            if steps.n_submit and name not in self._submitting:
                self._submitting[name] = asyncio.create_task(self._submit(name, steps.n_submit))

    def _worth(self, state: Any) -> dict[str, int]:
        """Workers of each pool that the known work is worth."""
        assert self._limits is not None
        least, most, in_all = self._limits
        limits = {name: min(most[name], pool.max_workers) for name, pool in self.pools.items()}
        n_workers = min(in_all, float(self.scheduler.adaptive_target(self._target_s)))
        found = spread(state, n_workers, limits) if state else {}
        return {name: max(found.get(name, 0), least[name]) for name in self.pools}

    async def _poll(self) -> None:
        """Ask the batch systems what became of the jobs, if it is time to."""
        now = time.monotonic()
        interval = self._poll_s
        if (
            not any(fleet.jobs for fleet in self._fleets.values())
            or now - self._polled_at < interval
        ):
            return
        self._polled_at = now
        for batch, system in self._systems.items():
            fleets = [fleet for fleet in self._fleets.values() if fleet.pool.batch == batch]
            jobs = {job for fleet in fleets for job in fleet.jobs}
            try:
                states = await system.states(jobs)
            except PoolError as error:  # as before: what is not known is not gone
                logger.warning("%s", error)
                continue
            for fleet in fleets:
                for job in fleet.answered(states, now):
                    self._judge(fleet, job)

    def _judge(self, fleet: Fleet, job: Job) -> None:
        """A job is over: say so if it is one of several that did nothing."""
        log = log_of(self._begin(fleet.name, ""), job.id)
        if job.is_cancelled or job.has_joined or not log.exists():  # without output it never began
            return
        if fleet.ended_in_vain(_end_of(log), time.monotonic()):
            logger.error("Pool %s: %s", fleet.name, fleet.trouble)

    async def _submit(self, name: str, n_jobs: int) -> None:
        """Submit jobs; what is refused is tried again later."""
        fleet, start = self._fleets[name], self._begin(name, self.scheduler.address)
        try:
            ids = await self._system(name).submit(start, n_jobs)
        except Exception as error:  # not only the batch system's own: none may be asked in a loop
            is_new, why = str(error) != fleet.trouble, str(error) or repr(error)
            if is_new:
                logger.error("Pool %s: %s", name, why, exc_info=not isinstance(error, PoolError))
            fleet.refused(why, time.monotonic())
        else:
            fleet.submitted(ids, time.monotonic())
        finally:
            del self._submitting[name]

    async def _retire(self, name: str, jobs: list[Job]) -> None:
        """End jobs: their workers hand over their results first."""
        workers = [worker for job in jobs for worker in job.workers]
        if workers:
            leaving = self.scheduler.retire_workers(names=workers, close_workers=True, remove=True)
            try:
                await asyncio.wait_for(leaving, _RETIRE_S)
            except TimeoutError:
                logger.warning("Workers %s have not handed over their results", workers)
        await self._cancel(name, [job.id for job in jobs])

    async def _cancel(self, name: str, jobs: list[str]) -> None:
        try:
            await self._system(name).cancel(jobs)
        except PoolError as error:
            logger.warning("Pool %s: %s", name, error)

    def _begin(self, name: str, address: str) -> Start:
        pool = self.pools[name]
        logs = home() / "logs" if pool.log_directory is None else pool.log_directory
        start = Start(address, name, pool, self._connection.tls, Path(logs).expanduser())
        start.logs.mkdir(parents=True, exist_ok=True)
        return start

    def _system(self, name: str) -> BatchSystem:
        return self._systems[self.pools[name].batch]

    def _by_pool(self, given: Any, method: str, kind: type) -> dict[str, Any]:
        """Numbers by pool, from what a user gives."""
        if not isinstance(given, Mapping):
            if given and len(self.pools) > 1:
                names = ", ".join(f"{name!r}: n" for name in self.pools)
                raise PoolError(
                    f"{method}({given!r}) does not say of which pool. Give {{{names}}}."
                )
            given = dict.fromkeys(self.pools, given)
        for name, n in given.items():
            if name not in self.pools:
                raise PoolError(f"There is no pool {name!r}; there are {', '.join(self.pools)}.")
            if isinstance(n, bool) or not isinstance(n, (int, float)) or n < 0 or n != n:
                raise PoolError(f"{method}: pool {name!r} cannot have {n!r} workers.")
        return {name: n if math.isinf(n) else int(n) for name, n in given.items()}


def _end_of(log: Path) -> str:
    """The last lines of a job's output."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"(not readable: {error.strerror})"
    return "\n".join(text.strip().splitlines()[-_N_LINES:]) or "(empty)"
