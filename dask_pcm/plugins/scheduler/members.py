"""A member is a worker whose plugin has greeted the gate."""

from __future__ import annotations

from dataclasses import dataclass

from distributed.scheduler import WorkerState


@dataclass(slots=True)
class Member:
    """A worker whose plugin has greeted the gate.

    Attributes
    ----------
    epoch
        New each time that the worker's plugin is set up; messages with another one are stale.
    cores
        The CPU cores that its process may run on.
    """

    epoch: str
    cores: tuple[int, ...]
    ws: WorkerState

    @property
    def host(self) -> str:
        """The host that it runs on."""
        return self.ws.host
