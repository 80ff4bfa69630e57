"""Drain time of a group by water-filling over all workers that serve it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView, remaining_s


class DrainTime:
    """Seconds until `n_rows` rows are done by workers that become ready at different times.

    Water-filling: the smallest T with sum(max(0, T - ready_s) / row_s) = n_rows.

    Parameters
    ----------
    n_rows
        Rows to be done.
    capacities
        (seconds until ready, seconds per row) of each worker.

    Attributes
    ----------
    seconds
        T; infinity without workers.

    Examples
    --------
    >>> drain = DrainTime(10, [(0.0, 1.0), (4.0, 1.0)])
    >>> drain.seconds, drain.fastest_row_s
    (7.0, 1.0)
    """

    def __init__(self, n_rows: float, capacities: Iterable[tuple[float, float]]) -> None:
        self._n_rows = n_rows
        #: Over workers ready by T: rows per second, and sum of ready_s / row_s.
        self._rate = self._level = 0.0
        self._ready: list[tuple[float, float]] = []  # a heap, the last to become ready first
        self.seconds = math.inf
        for ready_s, row_s in sorted(capacities):
            if ready_s >= self.seconds:
                break
            self.add(ready_s, row_s)

    def add(self, ready_s: float, row_s: float) -> None:
        """Add a worker; T shrinks, unless the worker becomes ready after it."""
        if ready_s >= self.seconds:
            return
        heapq.heappush(self._ready, (-ready_s, row_s))
        self._add_rate(ready_s, 1.0 / max(row_s, 1e-9))
        # A smaller T may exclude workers that become ready late.
        while len(self._ready) > 1 and -self._ready[0][0] >= self.seconds:
            late_s, row_s = heapq.heappop(self._ready)
            self._add_rate(-late_s, -1.0 / max(row_s, 1e-9))

    def _add_rate(self, ready_s: float, speed: float) -> None:
        """Add `speed` rows per second from `ready_s` on; a negative speed removes them."""
        self._rate += speed
        self._level += speed * ready_s
        self.seconds = (self._n_rows + self._level) / self._rate

    @property
    def fastest_row_s(self) -> float:
        """Seconds per row of the fastest worker ready by T; infinity without workers."""
        return min((row_s for _, row_s in self._ready), default=math.inf)


def drain_s(n_rows: float, capacities: Iterable[tuple[float, float]]) -> float:
    """Seconds until `n_rows` are done; see ``DrainTime``."""
    return DrainTime(n_rows, capacities).seconds


def capacities(
    state: GateState, group: Group, workers: Sequence[WorkerView], now: float
) -> list[tuple[float, float]]:
    """(seconds until ready, seconds per row) of each worker that is warm or loading for a group.

    A worker that ends before its next unit would is left out. The hazard rate of the worker's
    pool enters as longer rows; see ``Estimates.expected_s``.
    """
    found = []
    contexts = set(group.contexts)
    work = state.ahead.peek(group)
    n_rows = work.n_rows if work else 1.0
    for view in workers:
        if view.missing(group.contexts) or (view.evicting and view.evicting.keys() & contexts):
            continue
        ready_s = state.estimates.backlog_s(view, now)
        if view.loading_since:
            for context in group.contexts:
                since = view.loading_since.get(context)
                if since is not None:
                    ready_s += remaining_s(view.loading_s[context], now - since)
        unit_s = (state.estimates.row_s(group, view, now) or 0.0) * n_rows
        if now + ready_s + unit_s <= view.ends_at:
            found.append((ready_s, state.estimates.expected_s(view, unit_s, now) / n_rows))
    return found
