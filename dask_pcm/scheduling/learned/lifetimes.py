"""Worker lifetimes: a learned hazard rate per pool, and the expected duration of work under it."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Gamma prior of a pool's hazard rate, as losses and worker-seconds already observed.
_PRIOR_LOSSES, _PRIOR_S = 0.01, 360.0
#: Largest exponent of ``expected_s``: the result stays finite.
_MAX_EXPONENT = 50.0


@dataclass(slots=True)
class Lifetimes:
    """Lifetimes of one pool: worker-seconds lived, and workers lost.

    Attributes
    ----------
    n_workers
        Workers alive now.
    n_lost
        Workers lost so far; graceful departures do not count.
    lived_s
        Seconds lived by the workers that have left.
    joined_s
        Sum of the join times of the workers alive now, so that ``hazard`` needs no loop.
    """

    n_workers: int = 0
    n_lost: int = 0
    lived_s: float = 0.0

    joined_s: float = 0.0

    def add_worker(self, now: float) -> None:
        """A worker has joined."""
        self.n_workers += 1
        self.joined_s += now

    def remove_worker(self, joined_at: float, now: float, is_lost: bool) -> None:
        """A worker that joined at `joined_at` has left; `is_lost` if not by request."""
        self.n_workers -= 1
        self.n_lost += is_lost
        self.joined_s -= joined_at
        self.lived_s += now - joined_at

    def hazard(self, now: float) -> float:
        """Losses per second of a worker: posterior mean for exponential lifetimes, Gamma prior."""
        lived_s = self.lived_s + self.n_workers * now - self.joined_s
        return (self.n_lost + _PRIOR_LOSSES) / (lived_s + _PRIOR_S)


def expected_s(seconds: float, hazard: float) -> float:
    """Expected seconds until work of `seconds` uninterrupted seconds has completed once.

    Every loss restarts the work; losses are Poisson with `hazard` per second. This is the first
    term of Daly, "A higher order estimate of the optimum checkpoint interval" (Future Generation
    Computer Systems 22, 2006), without checkpoints: (exp(hazard * seconds) - 1) / hazard.

    Examples
    --------
    >>> round(expected_s(60.0, 1 / 60), 1), expected_s(60.0, 0.0)
    (103.1, 60.0)
    """
    if hazard * seconds < 1e-9:
        return seconds
    return math.expm1(min(hazard * seconds, _MAX_EXPONENT)) / hazard
