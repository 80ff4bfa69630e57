"""A simulated clock that advances from event to event."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Timer:
    """A scheduled callback that can be cancelled."""

    act: Callable[[], object] | None

    def cancel(self) -> None:
        """Cancel the callback; its entry stays in the heap and does nothing."""
        self.act = None


class Clock:
    """A heap of timers; timers of the same time fire in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def at(self, when: float, act: Callable[[], object]) -> Timer:
        """Schedule a callback at time `when`, in seconds; at once if that has passed."""
        timer = Timer(act)
        heapq.heappush(self._timers, (max(when, self.now), next(self._order), timer))
        return timer

    def after(self, seconds: float, act: Callable[[], object]) -> Timer:
        """Schedule a callback in `seconds` seconds."""
        return self.at(self.now + seconds, act)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Fire timers in order until `is_over` returns true or none is left."""
        while self._timers and not is_over():
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.act is not None:
                timer.act()
