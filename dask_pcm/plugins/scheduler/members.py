"""A worker whose plugin has said hello."""

from __future__ import annotations

from dataclasses import dataclass

from distributed.scheduler import WorkerState


@dataclass(slots=True)
class Member:
    """A worker whose plugin has said hello.

    Attributes
    ----------
    epoch
        New for each life of the worker's plugin; messages with another one are stale.
    cores
        The cores that its process may run on.
    """

    epoch: str
    cores: tuple[int, ...]
    ws: WorkerState

    @property
    def host(self) -> str:
        return self.ws.host
