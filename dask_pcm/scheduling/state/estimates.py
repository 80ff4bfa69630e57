"""How long things will take, by what was learned: costs, lifetimes, sizes of contexts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.learned.cost import CostModel
from dask_pcm.scheduling.learned.lifetimes import Lifetimes, expected_s
from dask_pcm.scheduling.state.contexts import ContextTable
from dask_pcm.scheduling.state.worker import WorkerView, remaining_s


@dataclass(slots=True)
class Estimates:
    """Learned costs and lifetimes, and what they say of a worker; all durations in seconds."""

    cost: CostModel = field(default_factory=CostModel)
    #: Lifetimes by pool of workers.
    pools: dict[str, Lifetimes] = field(default_factory=dict)
    contexts: ContextTable = field(default_factory=ContextTable)

    def add_worker(self, pool: str, now: float) -> None:
        """A worker of a pool has joined."""
        self.pools.setdefault(pool, Lifetimes()).add_worker(now)

    def remove_worker(self, view: WorkerView, is_lost: bool, now: float) -> None:
        """A worker has left; what it taught about its pool and its device model stays."""
        # Notice of preemption makes a graceful departure a loss: the machine was taken away.
        self.pools[view.pool].remove_worker(view.joined_at, now, is_lost or view.is_preempted)
        self.cost.forget_worker(view.address)

    def settle(self, view: WorkerView, now: float) -> None:
        """Turn the rows that a worker has finished since the last call into learned costs.

        The worker counts as one server. While it has work, the time between two finishes is the
        cost of the second, in whichever lane it ran. Finishes reported together share the time by
        their rows. Lanes alternate, so time in excess of the learned cost was spent on the work
        that still runs; `ahead_s` keeps it.
        """
        if not view.finished:
            return
        seconds, n_rows = now - view.busy_since, sum(view.finished.values())
        view.ahead_s = view.ahead_s + seconds if n_rows else 0.0
        for group, done in view.finished.items():
            if not done:
                continue
            costs = group.costs, view.address, view.device
            self.cost.observe_rows(*costs, seconds * done / n_rows, done)
            view.ahead_s -= done * (self.cost.row_s(*costs) or 0.0)
        view.ahead_s = min(max(0.0, view.ahead_s), self.given_s(view) or 0.0)
        view.finished.clear()
        view.busy_since = now

    def given_s(self, view: WorkerView) -> float | None:
        """Learned seconds of all work assigned and not ended; None while a cost is unknown."""
        total = 0.0
        for group, n_rows in view.n_rows.items():
            row_s = self.cost.row_s(group.costs, view.address, view.device)
            if row_s is None:
                return None
            total += n_rows * row_s
        return total

    def backlog_s(self, view: WorkerView, now: float) -> float:
        """Estimated seconds until `view` has finished its assigned work.

        Work of unknown cost is expected to take as long again as it has taken so far.
        """
        if not view.running:
            return 0.0
        seconds, unknown_s, elapsed_s = 0.0, 0.0, now - view.busy_since
        for group, n_rows in view.n_rows.items():
            row_s = self.cost.row_s(group.costs, view.address, view.device)
            if row_s is None and n_rows:
                unknown_s = elapsed_s
            else:
                seconds += n_rows * (row_s or 0.0)
        return remaining_s(max(0.0, seconds + unknown_s - view.ahead_s), elapsed_s) + unknown_s

    def row_s(self, group: Group, view: WorkerView, now: float) -> float | None:
        """Seconds per row on a worker: learned, or a lower bound while the first rows run."""
        learned = self.cost.row_s(group.costs, view.address, view.device)
        if learned is not None:
            return learned
        running = view.n_rows.get(group)
        return (now - view.busy_since) / running if running else None

    def expected_s(self, view: WorkerView, seconds: float, now: float) -> float:
        """Expected seconds for work of `seconds` seconds on `view`, repeats after losses included.

        The hazard rate is that of the worker's pool; see ``lifetimes.expected_s``.
        """
        pool = self.pools.get(view.pool)
        return seconds if pool is None else expected_s(seconds, pool.hazard(now))

    def lasting_s(self, view: WorkerView, seconds: float, begins_at: float) -> float:
        """As ``expected_s``; infinity if the worker ends before the work does."""
        if begins_at + seconds > view.ends_at:
            return math.inf
        return self.expected_s(view, seconds, begins_at)

    def warm_s(self, view: WorkerView, context: str) -> float:
        """Estimated seconds to bring a context to a worker's device."""
        return self.contexts.warm_s(view, context, self.cost)

    def validate(self, workers: Iterable[WorkerView]) -> None:
        """Raise AssertionError if the pools do not count the workers that are alive."""
        n_alive = {name: pool.n_workers for name, pool in self.pools.items() if pool.n_workers}
        pools = [view.pool for view in workers]
        assert n_alive == {name: pools.count(name) for name in set(pools)}
