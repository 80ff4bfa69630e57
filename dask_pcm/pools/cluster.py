"""A Dask cluster of pools: it submits jobs, replaces those that end and gives back idle ones."""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Mapping
from typing import Any

from distributed import Scheduler, Security
from distributed.core import Status
from distributed.deploy.spec import SpecCluster
from distributed.utils import NoOpAwaitable

from dask_pcm.errors import PoolError
from dask_pcm.pools.connection import Connection
from dask_pcm.pools.dashboard import proxied, tunnel
from dask_pcm.pools.fleet import Fleet
from dask_pcm.pools.jobs import Jobs
from dask_pcm.pools.pool import pools_of
from dask_pcm.pools.quiet import Quiet
from dask_pcm.pools.settings import ClusterSettings
from dask_pcm.pools.upkeep import Upkeep
from dask_pcm.pools.wishes import Wishes

#: Of this process: its clusters share the handlers of its log.
_QUIET = Quiet()


class PoolCluster(SpecCluster):  # type: ignore[misc] # untyped
    """Workers of several kinds of jobs, on one scheduler in this process.

    A job that ends, for any reason, is replaced: at the batch system's notice, where it gives
    one, otherwise as soon as its workers are gone. The scheduler has the toolkit's plugins.

    Parameters
    ----------
    pools
        Pools by name, or a YAML file with a section ``pools``. Its section ``cluster`` may have
        host, interface, port, dashboard_address and poll_interval; arguments precede it.
    host, interface
        Where workers reach the scheduler; Dask's defaults.
    port
        Where it listens: a port, a range such as "8786:8799" of which the first free one is taken,
        or 0 for any.
    dashboard_address
        Where the dashboard listens: on this machine alone, unless another address is given.
    poll_interval
        Between two queries of a batch system, such as "120s" where a site asks for it; None for
        the setting ``pcm.pools.poll-interval``.
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
        port: int | str = 0,
        dashboard_address: str | None = "127.0.0.1:0",
        poll_interval: str | float | None = None,
        security: bool | Security = True,
        name: str | None = None,
        asynchronous: bool = False,
        loop: Any = None,
        silence_logs: int | bool = logging.WARNING,
    ) -> None:
        given = ClusterSettings(host, interface, port, dashboard_address, poll_interval)
        self._settings = given.over_file(pools)
        self.pools = pools_of(pools)
        self._fleets = {name: Fleet(name, pool) for name, pool in self.pools.items()}
        self._wishes = Wishes(self.pools)
        if not isinstance(security, (bool, Security)):
            raise PoolError(f"security is {security!r:.40}; expected True, False or a Security.")
        if security is True:
            security = Security.temporary()
        self._connection = Connection.make(name or "cluster", security or None)
        self._jobs = Jobs(self.pools, self._connection)
        self._upkeep: Upkeep | None = None
        options = {
            "host": self._settings.host,
            "interface": self._settings.interface,
            "dashboard_address": self._settings.dashboard_address,
            "protocol": "tls://" if security else None,
            "security": security or None,
            "preload": ["dask_pcm.preload"],
        }
        self._is_quiet = bool(silence_logs)
        if self._is_quiet:
            _QUIET.begin(int(silence_logs))
        try:
            super().__init__(
                scheduler={"cls": Scheduler, "options": options},
                name=name,
                asynchronous=asynchronous,
                loop=loop,
                security=security or None,
            )
        except BaseException:
            self._connection.remove()
            self._speak_again()
            if hasattr(self, "_loop_runner") and not asynchronous:
                self._loop_runner.stop()
            raise

    def scale(self, n: int | Mapping[str, int] = 0, memory: None = None, cores: None = None) -> Any:
        """Have as many workers, regardless of the work.

        Parameters
        ----------
        n
            Workers by pool; pools that are not named stay as they are. A number, if there is one
            pool only; 0 ends the jobs of all.
        """
        if memory is not None or cores is not None:
            raise PoolError("scale takes workers: cluster.scale({'a10': 4}).")
        self._refuse_if_closed()
        self._wishes.scale(n)
        self._forgive()
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
        self._refuse_if_closed()
        self._wishes.adapt(minimum, maximum, target_duration)
        self._forgive()

    def _refuse_if_closed(self) -> None:
        if self.status in (Status.closing, Status.closed):
            raise PoolError("The cluster is closed. Make a new one.")

    def _forgive(self) -> None:
        """What pools were refused is forgotten: the user has asked anew."""
        for fleet in self._fleets.values():
            fleet.forgive()

    @property
    def connection_file(self) -> str:
        """The file with which ``pcm.connect`` finds this cluster; only this user can read it."""
        return str(self._connection.file)

    @property
    def dashboard_link(self) -> str:
        """Where the dashboard is; on this machine, unless another address was given.

        In a notebook of JupyterHub, the link of its proxy (jupyter-server-proxy).
        """
        link = str(super().dashboard_link)
        if link and self._settings.is_dashboard_local:
            host = self.scheduler_address.split("://")[1].rpartition(":")[0]
            return proxied(link.replace(f"//{host}:", "//127.0.0.1:"), os.environ)
        return link

    @property
    def dashboard_tunnel(self) -> str:
        """The ``ssh`` command with which another machine can open `dashboard_link`.

        Empty where the dashboard listens for other machines, or JupyterHub passes it on.
        """
        link = self.dashboard_link
        return tunnel(link) if link and self._settings.is_dashboard_local else ""

    @property
    def lack(self) -> str:
        """What the cluster waits for, in words; "" if nothing."""
        fleets = self._fleets.values()
        waiting = [str(one) for one in fleets if one.n_waiting() or one.n_starting() or one.trouble]
        waiting += [f"{batch}: {words}" for batch, words in self._jobs.silence.items()]
        return f"waiting for jobs: {'; '.join(waiting)}" if waiting else ""

    @property
    def plan(self) -> set[str]:
        """Names for the workers that are wanted."""
        return {f"{name}-{k}" for name, n in self._wishes.targets.items() for k in range(n)}

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

    def __repr__(self) -> str:
        text, link, command = super().__repr__(), self.dashboard_link, self.dashboard_tunnel
        if link:
            text += f"\n  dashboard: {link}"
        return text + (f" (from another machine: {command})" if command else "")

    def _repr_html_(self, cluster_status: str | None = None) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{pool.batch}</td><td>{self._wishes.targets[name]}</td>"
            f"<td>{sum(len(j.workers) for j in fleet.jobs.values())}</td>"
            f"<td>{fleet.n_waiting()}</td><td>{html.escape(fleet.trouble.split(chr(10))[0])}</td></tr>"
            for (name, pool), fleet in zip(self.pools.items(), self._fleets.values(), strict=True)
        )
        heads = "".join(
            f"<th>{h}</th>" for h in ("pool", "batch", "wanted", "workers", "pending", "")
        )
        table, command = f"<table><tr>{heads}</tr>{rows}</table>", self.dashboard_tunnel
        if command:
            table += (
                "<p>To open the dashboard from another machine, run there:"
                f" <code>{html.escape(command)}</code></p>"
            )
        return str(super()._repr_html_(table))

    async def _start(self) -> None:
        try:
            if self.status == Status.created:
                await self._jobs.check()
                self.scheduler_spec["options"]["port"] = self._settings.free_port()
            await super()._start()
        except BaseException:
            self._connection.remove()
            raise
        if self._upkeep is None:
            self._connection.publish(self.scheduler.address)
            await self._jobs.cancel_left()
            self._upkeep = Upkeep(
                self.scheduler, self._fleets, self._jobs, self._wishes, self._settings.poll_s
            )

    def _speak_again(self) -> None:
        if self._is_quiet:
            self._is_quiet = False
            _QUIET.end()

    async def _close(self) -> None:
        upkeep, self._upkeep = self._upkeep, None
        try:
            if upkeep is not None:
                await upkeep.close()
            await super()._close()
        finally:
            self._connection.remove()
            self._speak_again()
            for name, fleet in self._fleets.items():
                await self._jobs.cancel(name, list(fleet.jobs))
            await self._jobs.close()
