"""How long workers last: the hazard of each pool, learned, and what it makes of durations."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: What is believed of a pool of which nothing is known: so many losses in so many seconds.
_PRIOR_LOSSES, _PRIOR_S = 0.01, 360.0
#: No duration is taken for longer than e to this of its lifetimes.
_MAX_EXPONENT = 50.0


@dataclass(slots=True)
class Pool:
    """Workers of one kind: how many seconds they have lived, and how many were lost."""

    n_workers: int = 0
    n_lost: int = 0
    lived_s: float = 0.0
    #: Sum of the times at which those that live now have joined.
    joined_s: float = 0.0

    def join(self, now: float) -> None:
        self.n_workers += 1
        self.joined_s += now

    def leave(self, joined_at: float, now: float, is_lost: bool) -> None:
        self.n_workers -= 1
        self.n_lost += is_lost
        self.joined_s -= joined_at
        self.lived_s += now - joined_at

    def hazard(self, now: float) -> float:
        """Losses a second of a worker: Gamma prior, exponential lives."""
        lived_s = self.lived_s + self.n_workers * now - self.joined_s
        return (self.n_lost + _PRIOR_LOSSES) / (lived_s + _PRIOR_S)


def expected_s(seconds: float, hazard: float) -> float:
    """Seconds until something that takes `seconds` without a break has been done once.

    Each loss begins it anew; losses come at a rate of `hazard` a second. The first term of Daly, "A
    higher order estimate of the optimum checkpoint interval" (Future Generation Computer Systems
    22, 2006), without checkpoints: (exp(hazard * seconds) - 1) / hazard.

    Examples
    --------
    >>> round(expected_s(60.0, 1 / 60), 1), expected_s(60.0, 0.0)
    (103.1, 60.0)
    """
    if hazard * seconds < 1e-9:
        return seconds
    return math.expm1(min(hazard * seconds, _MAX_EXPONENT)) / hazard
