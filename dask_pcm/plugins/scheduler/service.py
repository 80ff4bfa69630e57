"""What the parts of the gate in the scheduler process have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.scheduling.events import Action, Event


class Observer(Protocol):
    """Sees every event that the gate applies and every action that it carries out.

    Called on the scheduler's event loop, after the event and before the action; must not block.
    """

    def on_event(self, event: Event, now: float) -> None: ...

    def on_action(self, action: Action, now: float) -> None: ...


class Service:
    """A part of the gate in the scheduler process.

    All methods are called on the scheduler's event loop. A service implements those it needs.
    """

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """RPCs of clients and workers, by name."""
        return {}

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """Messages of workers, by name.

        Called with the worker's address and the message's fields. Messages of an earlier life of
        the worker's plugin (another epoch) are dropped before.
        """
        return {}

    def worker_joined(self, worker: str, member: Member) -> None:
        """A worker's plugin has said hello, for the first time or with a new epoch."""

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        """A worker is gone; `is_lost` if nobody asked it to go."""

    def client_left(self, client: str) -> None:
        """A client is gone."""

    def restarted(self) -> None:
        """Somebody restarts all workers."""

    def tick(self) -> None:
        """Called every ``pcm.gate.tick``."""

    def uninstall(self) -> None:
        """The plugin is removed from a scheduler that lives on; called after ``close``."""

    def close(self) -> None:
        """The plugin is removed, or the scheduler closes."""
