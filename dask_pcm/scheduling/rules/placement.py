"""Earliest finish wins: which worker is given what waits."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple

from dask_pcm.scheduling.events import Assign, Group, Work
from dask_pcm.scheduling.rules.drain_time import DrainTime, offers
from dask_pcm.scheduling.state.state import Forecast, GateState
from dask_pcm.scheduling.state.worker import WorkerView


class _Free(NamedTuple):
    """A worker with room; where nothing is known of how long anything takes, who has least."""

    backlog_s: float
    n_running: int
    address: str


class Placement:
    """One round of handing out what waits.

    Parameters
    ----------
    pipeline_s
        Seconds of work that a worker is given ahead of what it does.
    """

    def __init__(self, state: GateState, now: float, pipeline_s: float) -> None:
        self._state = state
        self._now = now
        self._pipeline_s = pipeline_s

    def assign(self, views: Iterable[WorkerView]) -> None:
        """Give work to those of `views` that have room, the most urgent first.

        Each piece goes to whoever is free first, unless that one is slow and would hold up the end.
        """
        state = self._state
        free = self._free(views)
        urgent = [(state.urgency(group), number, group) for number, group in enumerate(free)]
        heapq.heapify(urgent)
        while urgent:
            _, number, group = heapq.heappop(urgent)
            if self._next(group, free[group]) and state.peek(group) is not None:
                heapq.heappush(urgent, (state.urgency(group), number, group))

    def _free(self, views: Iterable[WorkerView]) -> dict[Group, list[_Free]]:
        """Workers with room, by the groups whose work they could take; each a heap."""
        state = self._state
        free: dict[Group, list[_Free]] = {}
        for view in views:
            if not self._has_room(view):
                state.roomy.pop(view.address, None)
                continue
            state.roomy[view.address] = None
            groups = [group for group in self._waiting_for(view) if state.may_serve(view, group)]
            if groups:
                backlog_s = state.backlog_s(view, self._now)
                entry = _Free(backlog_s, len(view.running), view.address)
                for group in groups:
                    free.setdefault(group, []).append(entry)
        for heap in free.values():
            heapq.heapify(heap)
        return free

    def _waiting_for(self, view: WorkerView) -> Iterable[Group]:
        """Groups with work that waits for some context that a worker has."""
        by_context, standings = self._state.waiting.by_context, view.tiers
        if len(standings) <= len(by_context):
            wanted = [context for context in standings if context in by_context]
        else:
            wanted = [context for context in by_context if context in standings]
        if len(wanted) == 1:
            return by_context[wanted[0]]
        return dict.fromkeys(group for context in wanted for group in by_context[context])

    def _has_room(self, view: WorkerView) -> bool:
        """Whether a worker takes more: a lane is free, or what it has would hardly last."""
        if len(view.running) < view.n_lanes:
            return not view.is_taken
        given_s = self._state.given_s(view)
        return given_s is not None and given_s < self._pipeline_s and not view.is_taken

    def _next(self, group: Group, heap: list[_Free]) -> bool:
        """Give one piece of a group's work to whoever is free first, if anybody should have it."""
        state, now = self._state, self._now
        doomed: list[WorkerView] = []
        while heap:
            entry = heapq.heappop(heap)
            view = state.workers[entry.address]
            if not self._has_room(view) or not _is_for(view, group):
                continue
            backlog_s = state.backlog_s(view, now)
            current = _Free(backlog_s, len(view.running), view.address)
            if current > entry:  # it has been given other work meanwhile
                heapq.heappush(heap, current)
                continue
            work = state.peek(group, view.device)
            if work is None:
                return False
            seconds = (state.row_s(group, view, now) or 0.0) * work.n_rows
            finish_s = backlog_s + state.lasting_s(view, seconds, now + backlog_s)
            if math.isinf(finish_s):
                doomed.append(view)
            elif self._is_in_time(group, finish_s, work.n_rows):
                self._give(work, view, heap, finish_s)
                return True
        return self._last_resort(group, doomed, heap)

    def _give(self, work: Work, view: WorkerView, heap: list[_Free], finish_s: float) -> None:
        state, now = self._state, self._now
        state.decide(Assign(work.key, view.address), now, finish_s, work.n_rows)
        if self._has_room(view):
            entry = _Free(state.backlog_s(view, now), len(view.running), view.address)
            heapq.heappush(heap, entry)
        else:
            state.roomy.pop(view.address, None)

    def _is_in_time(self, group: Group, finish_s: float, n_rows: float) -> bool:
        """Whether nothing is held up: else whoever is fastest takes it, once done with the rest."""
        state, now = self._state, self._now
        forecast = state.forecasts.get(group)
        if forecast is None or forecast.plan < state.n_plans:
            if forecast is not None:
                # There is far more to do than would be held up: nobody needs to be looked at.
                rows_each = state.rows_ahead(group) / len(state.workers)
                if finish_s < rows_each * forecast.fastest_row_s:
                    return True
            made = offers(state, group, state.candidates(group), now)
            water = DrainTime(state.rows_ahead(group), made)
            forecast = Forecast(state.n_plans, now + water.seconds, water.fastest_row_s)
            state.forecasts[group] = forecast
        latest_at = forecast.drained_at + forecast.fastest_row_s * n_rows
        return now + finish_s <= latest_at + 1e-3 * finish_s

    def _last_resort(self, group: Group, doomed: list[WorkerView], heap: list[_Free]) -> bool:
        """What no worker lasts for goes to the one that lasts longest: some of it gets done."""
        doomed = [view for view in doomed if not view.is_draining]
        if not doomed:
            return False
        state, now = self._state, self._now
        work = state.peek(group)
        assert work is not None
        for view in state.candidates(group):
            seconds = (state.row_s(group, view, now) or 0.0) * work.n_rows
            if view.holds(group.contexts) and now + seconds <= view.ends_at:
                return False  # it waits for that one
        self._give(work, max(doomed, key=lambda view: view.ends_at), heap, math.inf)
        return True


def _is_for(view: WorkerView, group: Group) -> bool:
    """Whether a worker that is kept for some work, or is to be empty, may take this."""
    if group.is_isolated:
        return not view.running and view.reserved_for in (None, group)
    return view.reserved_for is None


def keep(state: GateState, now: float) -> None:
    """Have a worker run empty for each group whose work needs one for itself.

    One that lasts for it; where none does, the one that lasts longest.
    """
    for view in state.workers.values():
        group = view.reserved_for
        if group is not None and not (
            group in state.waiting.queues and state.may_serve(view, group)
        ):
            view.reserved_for = None
    for group in state.waiting.queues:
        if not group.is_isolated:
            continue
        serving = [
            view
            for view in state.candidates(group)
            if view.reserved_for in (None, group) and state.may_serve(view, group)
        ]
        lasting = [view for view in serving if _lasts(state, view, group, now)]
        longest = sorted((v for v in serving if not v.is_draining), key=lambda view: view.ends_at)[
            -1:
        ]
        fit = lasting or longest
        kept = [view for view in fit if view.reserved_for == group]
        for view in serving:
            view.reserved_for = None
        if fit:
            best = kept or [min(fit, key=lambda view: state.backlog_s(view, now))]
            best[0].reserved_for = group


def _lasts(state: GateState, view: WorkerView, group: Group, now: float) -> bool:
    """Whether a worker could do a group's next work before it ends, once it is empty."""
    work = state.peek(group)
    assert work is not None
    seconds = (state.row_s(group, view, now) or 0.0) * work.n_rows
    return now + state.backlog_s(view, now) + seconds <= view.ends_at
