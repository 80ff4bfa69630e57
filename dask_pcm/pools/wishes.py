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
    most
        Workers that there may be at this moment, by pool.
    is_adaptive
        Whether they follow the work.
    """

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self._pools = pools
        self.targets: dict[str, int] = dict.fromkeys(pools, 0)
        self.most: dict[str, float] = dict.fromkeys(pools, math.inf)
        self.is_adaptive = False

    def scale(self, given: int | Mapping[str, int]) -> None:
        """Want as many workers, regardless of the work."""
        found = self._by_pool(given, "scale")
        if endless := [name for name, n in found.items() if math.isinf(n)]:
            raise PoolError(f"scale: pool {endless[0]!r} cannot have endless workers.")
        for name, n in found.items():
            if n > (most := self._pools[name].max_workers):
                raise PoolError(
                    f"scale: pool {name!r} cannot have {n:.0f} workers; its max_jobs allows"
                    f" {most:.0f}."
                )
        self.targets.update({name: int(n) for name, n in found.items()})
        self.most = dict.fromkeys(self._pools, math.inf)
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
        self._refuse_contradictions(least, most, in_all)
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
            self._set_targets(found, {name: one.n_counted for name, one in offers.items()})
            self._set_most({name: offers[name].n_here for name in found})

    def _set_targets(self, worth: dict[str, int], counted: Mapping[str, float]) -> None:
        """Want whole jobs, within the limits; `worth` has the best pool first.

        What a pool cannot be counted on for is no part of the maximum of all.
        """
        each = {name: self._pools[name].workers_per_job for name in worth}
        for name, n in worth.items():
            wanted = max(self._least[name], n)
            n_most = min(self._most[name], wanted + each[name])  # finite
            n_jobs = min(math.ceil(wanted / each[name]), int(n_most) // each[name])
            self.targets[name] = n_jobs * each[name]
        for name in reversed(worth):
            over = sum(min(n, counted[key]) for key, n in self.targets.items()) - self._in_all
            spare = (self.targets[name] - self._least[name]) // each[name]
            if over > 0:
                self.targets[name] -= int(min(math.ceil(over / each[name]), spare)) * each[name]

    def _set_most(self, here: Mapping[str, int]) -> None:
        """Once the maximum of all is reached, what still waits is too much; the best pool first."""
        self.most = dict.fromkeys(here, math.inf)
        left = self._in_all
        if sum(here.values()) < left:
            return
        for name, n in here.items():
            each = self._pools[name].workers_per_job
            self.most[name] = min(n, left) // each * each
            self.targets[name] = int(min(self.targets[name], self.most[name]))
            left -= self.most[name]

    def _refuse_contradictions(
        self, least: Mapping[str, float], most: Mapping[str, float], in_all: float
    ) -> None:
        """Raise PoolError if no number of workers is within the limits."""
        n_least_in_all = 0
        for name, pool in self._pools.items():
            n_least = math.ceil(least[name] / pool.workers_per_job) * pool.workers_per_job
            n_least_in_all += n_least
            if least[name] > most[name] or n_least > most[name]:
                raise PoolError(
                    f"adapt: pool {name!r} cannot have {least[name]:.0f} workers at least and"
                    f" {most[name]:.0f} at most; its jobs have {pool.workers_per_job} each."
                )
            if 0 < most[name] < pool.workers_per_job:
                raise PoolError(
                    f"adapt: pool {name!r} cannot have {most[name]:.0f} workers at most; its jobs"
                    f" have {pool.workers_per_job} each. Give a larger maximum, or 0."
                )
        n_each = [p.workers_per_job for name, p in self._pools.items() if most[name]]
        if 0 < in_all < min(n_each, default=0):
            raise PoolError(
                f"adapt: there cannot be {in_all:.0f} workers at most; the smallest jobs have"
                f" {min(n_each)}."
            )
        if n_least_in_all > in_all:
            raise PoolError(
                f"adapt: the pools cannot have {n_least_in_all} workers at least, in whole jobs,"
                f" and {in_all:.0f} at most."
            )

    def _by_pool(self, given: Any, method: str) -> dict[str, float]:
        """Numbers by pool, from what a user gives."""
        if not isinstance(given, Mapping):
            self._check("a pool", given, method)
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
