"""The gate's state in the scheduler: events go in, the policy decides, actions come out.

Everything here runs on the scheduler's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from distributed import Scheduler
from distributed.metrics import monotonic

from dask_pcm.config import Config
from dask_pcm.plugins.scheduler.service import Observer, Service
from dask_pcm.plugins.scheduler.watchdog import Watchdog
from dask_pcm.scheduling.actions import Action
from dask_pcm.scheduling.events import Event
from dask_pcm.scheduling.rules.rules import Rules
from dask_pcm.scheduling.state.state import GateState

logger = logging.getLogger(__name__)


class Hub:
    """The state that all services of the gate share, and the way in for events.

    Attributes
    ----------
    services
        All services, in the order in which they are notified.
    observers
        Notified of every event and action.
    carry_out
        Called with the actions of each decision.
    """

    def __init__(self, scheduler: Scheduler, config: Config) -> None:
        self.scheduler = scheduler
        self.config = config
        self.services: tuple[Service, ...] = ()
        self.observers: list[Observer] = []
        self.carry_out: Callable[[list[Action]], None] = lambda actions: None
        self._watchdog = Watchdog(config.stall_s)
        self._loop = asyncio.get_running_loop()
        self._before: list[Callable[[], None]] = []
        self._is_woken = False
        self._numbers = count()
        self.reset()

    def reset(self) -> None:
        """Forget all workers and work."""
        self.state = GateState()

    def apply(self, event: Event) -> None:
        """Apply an event to the state; the policy decides in the loop's next turn."""
        now = monotonic()
        self.state.apply(event, now)
        self._notify("on_event", event, now)
        self.wake()

    def wake(self, first: Callable[[], None] | None = None) -> None:
        """Let the policy decide in the loop's next turn, after a call of `first`."""
        if first is not None and first not in self._before:
            self._before.append(first)
        # Never at once: transition hooks run in the middle of the scheduler's transitions, where
        # an action would start others. Later, one decision also serves all events of this turn.
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._decide)

    def _decide(self) -> None:
        """Let the policy decide, notify the observers, and carry out the actions."""
        self._is_woken = False
        before, self._before = self._before, []
        for call in before:
            call()
        now = monotonic()
        actions = self._watchdog.decide(self.state, now, Rules.of(self.config))
        for action in actions if self.observers else ():
            self._notify("on_action", action, now)
        self.carry_out(actions)

    def _notify(self, hook: str, what: Event | Action, now: float) -> None:
        for observer in self.observers:
            try:
                getattr(observer, hook)(what, now)
            except Exception:  # the gate does not depend on what only looks on
                logger.exception("An observer of the gate failed: %r", observer)

    def explain(self, key: Any) -> str:
        """Explain why a task waits, or where it was sent and why."""
        return self._watchdog.explain(self.state, key)

    def transition(self, recommendations: dict[Any, str], why: str) -> None:
        """Recommend new states of tasks to the scheduler."""
        if recommendations:
            self.scheduler.transitions(recommendations, self.stimulus(why))

    def stimulus(self, why: str) -> str:
        """Return a new stimulus id, by which Dask's logs name the cause of transitions."""
        return f"pcm-{why}-{next(self._numbers)}"

    def state_of(self, key: Any) -> str | None:
        """The scheduler's state of a task; None if it does not know the task."""
        ts = self.scheduler.tasks.get(key)
        return None if ts is None else ts.state

    def states_of(self, keys: Iterable[Any], state: str) -> list[Any]:
        """The tasks among `keys` that are in a state."""
        return [key for key in keys if self.state_of(key) == state]
