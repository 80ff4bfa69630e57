"""Which contexts go on which hosts, so that those that lend memory are beside those that borrow it.

An integer program after the placer of Vijaya Kumar, Antichi and Singh, "Aqua: Network-Accelerated
Memory Offloading for LLMs in Scale-Up GPU Domains" (ASPLOS 2025): minimise the largest balance of
memory of a host plus its largest surplus of lenders over borrowers, with a lender for each
borrower. What is even among hosts is enough for the borrowers of each. Equal copies are counted
instead of told apart, so that HiGHS (of SciPy) solves hundreds of devices in a second.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dask_pcm.scheduling.events import HostPlan
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.tiers import ON_DEVICE

_GIB = 1 << 30
#: Units in the largest amount of memory.
_MOST_UNITS = 24
#: What a borrower without a lender costs, as bytes: more than any balance that it would even out.
_ALONE = 1 << 40


@dataclass(frozen=True, slots=True)
class Placeable:
    """Copies of a context, each for a device.

    Attributes
    ----------
    spare_bytes
        What each has to lend; negative: what it needs beside its device's memory.
    """

    name: str
    spare_bytes: int
    n_copies: int


def place(
    contexts: Sequence[Placeable], n_devices: Mapping[str, int], limit_s: float = 10.0
) -> HostPlan | None:
    """Place all copies; None if there are more than devices, or no plan is found in time.

    Parameters
    ----------
    n_devices
        By host.
    limit_s
        Seconds that it may take; then the best plan so far counts. Blocks as long.

    Examples
    --------
    >>> few = [Placeable("image", 30 << 30, 2), Placeable("chat", -20 << 30, 2)]
    >>> plan = place(few, {"a": 2, "b": 2})
    >>> plan.n_on("a", "chat"), plan.n_on("b", "chat"), plan.most_bytes >> 30, plan.n_alone
    (1, 1, 10, 0)
    """
    kinds = [one for one in contexts if one.n_copies]
    if not kinds or sum(one.n_copies for one in kinds) > sum(n_devices.values()):
        return None
    return _Program(kinds, n_devices).solved(limit_s)


def to_place(state: GateState) -> tuple[list[Placeable], dict[str, int]] | None:
    """The contexts of a cluster and its hosts; None if none needs a neighbour's memory.

    Each context has as many copies as it has now, or more, so that together they fill the devices:
    the plan is the pattern that new copies follow. What a context has to lend is what the smallest
    device beside it has left; what it needs, workers have said.
    """
    needs = state.contexts.needs
    if not needs:  # as almost always
        return None
    held, room = Counter[str](), dict[str, int]()
    hosts = Counter[str]()
    for view in state.workers.values():
        hosts[view.host] += 1
        for context, tier in view.tiers.items():
            if tier in ON_DEVICE and view.device_bytes is not None:
                held[context] += 1
                left = max(0, view.device_bytes - view.taken_bytes)
                room[context] = min(room.get(context, left), left)
    if len(hosts) < 2 or len(held) < 2 or not needs.keys() & held.keys():
        return None
    n_devices, n_held = hosts.total(), held.total()
    contexts = [
        Placeable(
            context,
            -needs[context] if context in needs else room[context],
            max(1, n * n_devices // n_held),
        )
        for context, n in sorted(held.items())
    ]
    if sum(one.n_copies for one in contexts) > n_devices:  # as each has one at least
        contexts = [replace(one, n_copies=held[one.name]) for one in contexts]
    return contexts, dict(hosts)


def planned_hosts(state: GateState, contexts: Sequence[str]) -> Callable[[str], bool]:
    """Says of a host whether the plan has more copies of contexts there than there are.

    Without a plan, of every host.
    """
    plan = state.placement
    if plan is None:
        return lambda host: True
    there: dict[tuple[str, str], int] = {}
    for view in state.workers.values():
        for context in contexts:
            if view.tiers.get(context) in ON_DEVICE:
                there[view.host, context] = there.get((view.host, context), 0) + 1
    return lambda host: all(
        there.get((host, context), 0) < plan.n_on(host, context) for context in contexts
    )


class _Program:
    """Integers x[kind, host], then for each host its borrowers alone, then the two largest values.

    Memory is counted in units, so that HiGHS, which computes in floating point, sees small whole
    numbers: of hundreds of gibibytes in bytes it says that they fit nowhere. What is lent is
    rounded down, what is needed up.
    """

    def __init__(self, kinds: Sequence[Placeable], n_devices: Mapping[str, int]) -> None:
        self._kinds = kinds
        self._hosts = list(n_devices)
        self._sizes = list(n_devices.values())
        most = max(abs(one.spare_bytes) for one in kinds)
        self._unit = math.gcd(*(one.spare_bytes for one in kinds)) or 1
        if most > _MOST_UNITS * self._unit:
            self._unit = -(-most // _MOST_UNITS)
        self._spare = [one.spare_bytes // self._unit for one in kinds]
        self._is_lender = [1 if one.spare_bytes >= 0 else -1 for one in kinds]
        n_hosts = len(self._hosts)
        self._n_placed = len(kinds) * n_hosts
        self._n_numbers = self._n_placed + n_hosts + 2

    def solved(self, limit_s: float) -> HostPlan | None:
        import numpy as np
        from scipy.optimize import milp

        found = milp(
            self._cost(),
            constraints=self._constraints(),
            integrality=np.ones(self._n_numbers),
            bounds=self._bounds(),
            options={"time_limit": limit_s},
        )
        if found.x is None:
            return None
        numbers = np.rint(found.x).astype(int)
        n_hosts, n_placed = len(self._hosts), self._n_placed
        placed = numbers[:n_placed].reshape(len(self._kinds), n_hosts)
        hosts = {
            host: Counter({one.name: int(n) for one, n in zip(self._kinds, column, strict=True)})
            for host, column in zip(self._hosts, placed.T, strict=True)
        }
        return HostPlan(
            hosts,
            int((placed.T @ np.array([one.spare_bytes for one in self._kinds])).max()),
            int((placed.T @ np.array(self._is_lender)).max()),
            int(numbers[n_placed : n_placed + n_hosts].sum()),
            max(0.0, float(found.mip_gap)),
        )

    def _cost(self) -> Any:
        """A lender in surplus costs as much as a gibibyte, a borrower alone more than anything."""
        import numpy as np

        cost = np.zeros(self._n_numbers)
        cost[self._n_placed : -2] = _ALONE / _GIB
        cost[-2:] = self._unit / _GIB, 1.0
        return cost

    def _constraints(self) -> Any:
        import numpy as np
        from scipy.optimize import LinearConstraint
        from scipy.sparse import eye_array, hstack, kron

        n_kinds, n_hosts = len(self._kinds), len(self._hosts)
        each_host, none = eye_array(n_hosts), np.zeros((n_hosts, n_hosts))
        ones = np.ones((n_hosts, 1))

        def of_hosts(weights: Sequence[int], alone: Any, most: Sequence[float]) -> Any:
            """A sum over what is on each host."""
            largest = [weight * ones for weight in most]
            return hstack([kron([weights], each_host), alone, *largest]).tocsr()

        copies = hstack(
            [kron(eye_array(n_kinds), np.ones((1, n_hosts))), np.zeros((n_kinds, n_hosts + 2))]
        ).tocsr()
        n_copies = [one.n_copies for one in self._kinds]
        infinity = math.inf
        return [
            LinearConstraint(copies, n_copies, n_copies),
            LinearConstraint(of_hosts([1] * n_kinds, none, (0, 0)), 0, self._sizes),
            LinearConstraint(of_hosts(self._spare, none, (-1, 0)), -infinity, 0),
            LinearConstraint(of_hosts(self._is_lender, none, (0, -1)), -infinity, 0),
            LinearConstraint(of_hosts(self._is_lender, each_host, (0, 0)), 0, infinity),
        ]

    def _bounds(self) -> Any:
        """The largest value of a host is that of an even share at least: found so, it is proved."""
        import numpy as np
        from scipy.optimize import Bounds

        n_copies = np.array([one.n_copies for one in self._kinds])
        least = np.zeros(self._n_numbers)
        for at, weights in ((-2, self._spare), (-1, self._is_lender)):
            least[at] = math.ceil(int(n_copies @ np.array(weights)) / len(self._hosts))
        least[-2:] = np.maximum(least[-2:], 0)
        most = np.full(self._n_numbers, np.inf)
        most[: self._n_placed] = np.minimum.outer(n_copies, self._sizes).ravel()
        return Bounds(least, most)
