"""Settings of a cluster besides its pools: where it listens, and how often it asks."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from dask.utils import parse_timedelta

from dask_pcm.errors import PoolError
from dask_pcm.pools.pool import port_range, read_file, refuse_unknown

#: Only a process of this machine reaches it.
_LOOPBACK = "127.0.0.1:0"


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What ``PoolCluster`` takes, and the section ``cluster`` of its file may have.

    Attributes
    ----------
    host, interface, dashboard_address
        See ``PoolCluster``.
    port
        Where the scheduler listens: a port, "first:last", or 0 for any.
    poll_interval
        Between two queries of a batch system, as text or seconds; None for the setting
        ``pcm.pools.poll-interval``.
    """

    host: str | None = None
    interface: str | None = None
    port: int | str = 0
    dashboard_address: str | None = _LOOPBACK
    poll_interval: str | float | None = None

    def __post_init__(self) -> None:
        for name in ("host", "interface", "dashboard_address"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise PoolError(f"{name} is {value!r:.80}; expected a text.")
        try:
            port_range(self.port)
        except (ValueError, TypeError) as error:
            wanted = "a port, 'first:last', such as '8786:8799', or 0 for any"
            raise PoolError(f"port is {self.port!r:.80}; expected {wanted}.") from error
        try:
            is_time = self.poll_s is None or self.poll_s > 0
        except (KeyError, ValueError, TypeError):
            is_time = False
        if not is_time or isinstance(self.poll_interval, bool):
            raise PoolError(
                f"poll_interval is {self.poll_interval!r:.80}; expected a time, such as '120s'."
            )

    @property
    def poll_s(self) -> float | None:
        """Seconds between two queries of a batch system; None for the setting's."""
        if self.poll_interval is None:
            return None
        return float(parse_timedelta(self.poll_interval, "s"))

    @property
    def is_dashboard_local(self) -> bool:
        """Whether only this machine reaches the dashboard."""
        return str(self.dashboard_address).startswith(("127.0.0.1", "localhost"))

    def over_file(self, given: Mapping[str, Any] | str | os.PathLike[str]) -> ClusterSettings:
        """These settings, and the file's for all that are left at their defaults.

        Raises
        ------
        PoolError
            The file cannot be read, or its section ``cluster`` cannot be used.
        """
        found = {} if isinstance(given, Mapping) else read_file(given).get("cluster") or {}
        if not isinstance(found, dict):
            raise PoolError(f"The section cluster is {found!r:.80}; expected settings by name.")
        names = [field.name for field in fields(self)]
        refuse_unknown("The section cluster", found, names)
        base = ClusterSettings(**found)
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        default = ClusterSettings()
        return replace(base, **{k: v for k, v in mine.items() if v != getattr(default, k)})

    def free_port(self) -> int:
        """The first free port of the range; 0 for any.

        Raises
        ------
        PoolError
            All are taken.
        """
        ports = port_range(self.port)
        if len(ports) == 1:
            return ports[0]
        for port in ports:
            with socket.socket() as listening:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listening.bind(("", port))
                    listening.listen()
                except OSError as error:
                    if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                        raise
                    continue
                return port
        raise PoolError(
            f"None of the ports {ports[0]} to {ports[-1]} is free for the scheduler. Give more in"
            " port."
        )
