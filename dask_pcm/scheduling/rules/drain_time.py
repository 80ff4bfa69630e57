"""How soon all work of a group will be done, from one look at all workers that serve it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView, still_s


class DrainTime:
    """How soon rows can be done by workers that each work from some moment on.

    Water-filling: the smallest T with sum(max(0, T - ready) / seconds_per_row) = n_rows.

    Parameters
    ----------
    n_rows
        Rows to be done.
    offers
        For each worker the seconds until it is ready, and its seconds a row.

    Attributes
    ----------
    seconds
        T; infinity without offers.

    Examples
    --------
    >>> water = DrainTime(10, [(0.0, 1.0), (4.0, 1.0)])
    >>> water.seconds, water.fastest_row_s
    (7.0, 1.0)
    """

    def __init__(self, n_rows: float, offers: Iterable[tuple[float, float]]) -> None:
        self._n_rows = n_rows
        #: Of all who are ready by T: rows a second, and rows that they would have done by time 0.
        self._rate = self._level = 0.0
        self._ready: list[tuple[float, float]] = []  # a heap, the last to be ready first
        self.seconds = math.inf
        for ready_s, row_s in sorted(offers):
            if ready_s >= self.seconds:
                break
            self.add(ready_s, row_s)

    def add(self, ready_s: float, row_s: float) -> None:
        """One worker more."""
        if ready_s >= self.seconds:
            return
        heapq.heappush(self._ready, (-ready_s, row_s))
        self._pour(ready_s, 1.0 / max(row_s, 1e-9))
        while len(self._ready) > 1 and -self._ready[0][0] >= self.seconds:
            late_s, row_s = heapq.heappop(self._ready)
            self._pour(-late_s, -1.0 / max(row_s, 1e-9))

    def _pour(self, ready_s: float, speed: float) -> None:
        self._rate += speed
        self._level += speed * ready_s
        self.seconds = (self._n_rows + self._level) / self._rate

    @property
    def fastest_row_s(self) -> float:
        """Seconds a row of the fastest that is at it at the end; infinity without offers."""
        return min((row_s for _, row_s in self._ready), default=math.inf)


def drain_s(n_rows: float, offers: Iterable[tuple[float, float]]) -> float:
    """Seconds until `n_rows` are done; see ``DrainTime``."""
    return DrainTime(n_rows, offers).seconds


def offers(
    state: GateState, group: Group, views: Sequence[WorkerView], now: float
) -> list[tuple[float, float]]:
    """What every worker offers that is warm for a group, or will be.

    Rows take longer where a loss is likely to come in between.
    """
    found = []
    contexts = set(group.contexts)
    work = state.peek(group)
    n_rows = work.n_rows if work else 1.0
    for view in views:
        if view.missing(group.contexts) or (view.leaving and view.leaving.keys() & contexts):
            continue
        ready_s = state.backlog_s(view, now)
        if view.loading_since:
            for context in group.contexts:
                since = view.loading_since.get(context)
                if since is not None:
                    ready_s += still_s(view.loading_s[context], now - since)
        unit_s = (state.row_s(group, view, now) or 0.0) * n_rows
        if now + ready_s + unit_s <= view.ends_at:
            found.append((ready_s, state.expected_s(view, unit_s, now) / n_rows))
    return found
