"""How many workers of each pool the user wants: a number, or as many as the work is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dask.utils import parse_timedelta

from dask_pcm.errors import PoolError
from dask_pcm.pools.pool import Pool
from dask_pcm.scheduling.rules.scaling import Offer, spread
from dask_pcm.scheduling.state.state import GateState


class Wishes:
    """What ``scale`` and ``adapt`` have asked for.

    Attributes
    ----------
    targets
        Workers that are wanted now, by pool.
    is_adaptive
        Whether they follow the work.
    """

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self._pools = pools
        self.targets: dict[str, int] = dict.fromkeys(pools, 0)
        self.is_adaptive = False

    def scale(self, given: int | Mapping[str, int]) -> None:
        """Want as many workers, regardless of the work."""
        found = self._by_pool(given, "scale")
        if endless := [name for name, n in found.items() if math.isinf(n)]:
            raise PoolError(f"scale: pool {endless[0]!r} cannot have endless workers.")
        self.targets.update({name: int(n) for name, n in found.items()})
        self.is_adaptive = False

    def adapt(self, minimum: Any, maximum: Any, target_duration: str | float) -> None:
        """Want as many workers as the work is worth, within limits; see ``PoolCluster.adapt``."""
        wanted = self._by_pool(minimum or {}, "adapt")
        if endless := [name for name, n in wanted.items() if math.isinf(n)]:
            raise PoolError(f"adapt: pool {endless[0]!r} cannot have endless workers as minimum.")
        least = {**dict.fromkeys(self._pools, 0), **wanted}
        most: dict[str, float] = {name: pool.max_workers for name, pool in self._pools.items()}
        in_all = math.inf
        if isinstance(maximum, Mapping):
            found = self._by_pool(maximum, "adapt")
            most.update({name: min(most[name], n) for name, n in found.items()})
        elif maximum is not None:
            self._check("all pools", maximum, "adapt")
            in_all = float(maximum)
        try:
            self._target_s = float(parse_timedelta(target_duration, "s"))
        except (KeyError, ValueError, TypeError) as error:
            raise PoolError(
                f"adapt: target_duration is {target_duration!r}; expected a time such as '60s'."
            ) from error
        self._least, self._most, self._in_all = least, most, in_all
        self.is_adaptive = True

    def follow(
        self,
        n_wanted: Callable[[float], float],
        state: GateState | None,
        offers: Mapping[str, Offer],
        now: float,
    ) -> None:
        """Bring the targets up to date with the work, if they follow it.

        Parameters
        ----------
        n_wanted
            Gives the workers that would finish the known work within some seconds.
        offers
            What each pool can give, by its own limits.
        """
        if self.is_adaptive:
            n_needed = float(n_wanted(self._target_s))
            known = GateState() if state is None else state
            limited = {name: replace(one, most=self._most[name]) for name, one in offers.items()}
            found = spread(
                known, min(self._in_all, n_needed), limited, now, n_needed * self._target_s
            )
            self.targets = {name: max(int(self._least[name]), n) for name, n in found.items()}

    def _by_pool(self, given: Any, method: str) -> dict[str, float]:
        """Numbers by pool, from what a user gives."""
        if not isinstance(given, Mapping):
            if given and len(self._pools) > 1:
                names = ", ".join(f"{name!r}: n" for name in self._pools)
                raise PoolError(
                    f"{method}({given!r}) does not say of which pool. Give {{{names}}}."
                )
            given = dict.fromkeys(self._pools, given)
        for name, n in given.items():
            if name not in self._pools:
                raise PoolError(f"There is no pool {name!r}; there are {', '.join(self._pools)}.")
            self._check(f"pool {name!r}", n, method)
        return dict(given)

    def _check(self, what: str, n: Any, method: str) -> None:
        is_number = isinstance(n, (int, float)) and not isinstance(n, bool)
        if not is_number or not n >= 0 or (not math.isinf(n) and n != int(n)):
            raise PoolError(f"{method}: {what} cannot have {n!r} workers.")
