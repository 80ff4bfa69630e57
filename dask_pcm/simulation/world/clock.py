"""Time that passes from event to event."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Timer:
    """Something that will happen, unless it is called off."""

    act: Callable[[], object] | None

    def call_off(self) -> None:
        self.act = None


class Clock:
    """A heap of timers; those of one moment go off in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def at(self, when: float, act: Callable[[], object]) -> Timer:
        """Have something happen at a moment; at once if that has passed."""
        timer = Timer(act)
        heapq.heappush(self._timers, (max(when, self.now), next(self._order), timer))
        return timer

    def after(self, seconds: float, act: Callable[[], object]) -> Timer:
        return self.at(self.now + seconds, act)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Let time pass until it is over, or nothing is left to happen."""
        while self._timers and not is_over():
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.act is not None:
                timer.act()
