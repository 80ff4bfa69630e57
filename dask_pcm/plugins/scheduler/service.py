"""The protocols of the gate in the scheduler process: services and observers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.scheduling.actions import Action
from dask_pcm.scheduling.events import Event


class Observer(Protocol):
    """Sees every event that the gate applies and every action that it carries out.

    Called on the scheduler's event loop; must not block.
    """

    def on_event(self, event: Event, now: float) -> None:
        """An event was applied; `now` is Dask's monotonic clock, in seconds."""

    def on_action(self, action: Action, now: float) -> None:
        """An action is about to be carried out."""


class Service:
    """A part of the gate in the scheduler process.

    All methods are called on the scheduler's event loop. A service overrides those that it needs.
    """

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """Handlers of RPCs from clients and workers, by operation."""
        return {}

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """Handlers of workers' messages, by operation.

        Called with the worker's address and the message's fields. Stale messages, which carry an
        earlier epoch of the worker's plugin, are dropped before.
        """
        return {}

    def worker_joined(self, worker: str, member: Member) -> None:
        """A worker's plugin has greeted the gate, for the first time or with a new epoch."""

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        """A worker is gone; `is_lost` unless it was retired or removed on request."""

    def client_left(self, client: str) -> None:
        """A client has disconnected."""

    def restarted(self) -> None:
        """A client restarts the cluster."""

    def tick(self) -> None:
        """Called every ``pcm.gate.tick``."""

    def uninstall(self) -> None:
        """The plugin is removed from a scheduler that keeps running; called after ``close``."""

    def close(self) -> None:
        """The plugin is removed, or the scheduler closes."""
