"""How long tests wait: deadlines grow with the load of the machine.

``PCM_TEST_PATIENCE=5`` makes every deadline five times as long. Unset, it is the number of
processes that want to run for each core, at least 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_POLL_S = 0.02


def patience() -> float:
    """What deadlines are multiplied by."""
    if said := os.environ.get("PCM_TEST_PATIENCE"):
        return float(said)
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def patient(seconds: float) -> float:
    """A deadline in seconds, as long as it has to be on this machine."""
    return seconds * patience()


def until(condition: Callable[[], T], seconds: float = 30.0, what: str = "") -> T:
    """Wait until a condition holds, and return its value; fail after so many seconds.

    `what` says in words what is waited for.
    """
    begun = time.monotonic()
    while not (value := condition()):
        waited_s = time.monotonic() - begun
        assert waited_s < patient(seconds), f"{what or condition}: not after {waited_s:.0f} s"
        time.sleep(_POLL_S)
    return value
