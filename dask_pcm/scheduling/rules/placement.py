"""Earliest finish wins: each piece of work goes to the warm worker that would finish it first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple

from dask_pcm.scheduling.actions import Assign
from dask_pcm.scheduling.events import Group, Work
from dask_pcm.scheduling.rules.drain_time import DrainTime, capacities
from dask_pcm.scheduling.state.decisions import Forecast
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView

#: The least rows of a unit that a run has not cut yet.
_EXPECTED_ROWS = 32


class _Free(NamedTuple):
    """A worker with room, ordered by backlog; by number of tasks while costs are unknown."""

    backlog_s: float
    n_running: int
    address: str


class Placement:
    """One round of assignments.

    Parameters
    ----------
    state
        Updated in place through ``GateState.commit``.
    now
        Seconds of the policy's clock.
    pipeline_s
        Seconds of work assigned to a worker beyond the work that fills its lanes.
    """

    def __init__(self, state: GateState, now: float, pipeline_s: float) -> None:
        self._state = state
        self._now = now
        self._pipeline_s = pipeline_s

    def assign(self, workers: Iterable[WorkerView]) -> None:
        """Assign work to those of `workers` that have room, the most urgent group first.

        A piece goes to the worker that is free first, unless that worker is so slow that it would
        delay the end. Urgency changes with each assignment, because clients share by service.
        """
        state = self._state
        free = self._free(workers)
        urgent = [(state.ahead.urgency(group), number, group) for number, group in enumerate(free)]
        heapq.heapify(urgent)
        while urgent:
            _, number, group = heapq.heappop(urgent)
            if self._next(group, free[group]) and state.ahead.peek(group) is not None:
                heapq.heappush(urgent, (state.ahead.urgency(group), number, group))

    def _free(self, workers: Iterable[WorkerView]) -> dict[Group, list[_Free]]:
        """A heap of workers with room, for each group whose work they may run."""
        state = self._state
        free: dict[Group, list[_Free]] = {}
        for view in workers:
            if not self._has_room(view):
                state.plans.roomy.pop(view.address, None)
                continue
            state.plans.roomy[view.address] = None
            groups = [
                group
                for group in self._waiting_for(view)
                if state.can_serve(view, group) and view.has_rows_left(group)
            ]
            if groups:
                backlog_s = state.estimates.backlog_s(view, self._now)
                entry = _Free(backlog_s, len(view.running), view.address)
                for group in groups:
                    free.setdefault(group, []).append(entry)
        for heap in free.values():
            heapq.heapify(heap)
        return free

    def _waiting_for(self, view: WorkerView) -> Iterable[Group]:
        """Groups with waiting work for some context that a worker has on any tier."""
        by_context, tiers = self._state.ahead.waiting.by_context, view.tiers
        # Iterate over the smaller side: this runs for every worker at every event.
        if len(tiers) <= len(by_context):
            wanted = [context for context in tiers if context in by_context]
        else:
            wanted = [context for context in by_context if context in tiers]
        if len(wanted) == 1:
            return by_context[wanted[0]]
        return dict.fromkeys(group for context in wanted for group in by_context[context])

    def _has_room(self, view: WorkerView) -> bool:
        """Whether a lane is free, or the assigned work lasts less than `pipeline_s`."""
        if view.n_on_lanes < view.n_lanes:
            return not view.has_isolated_work
        given_s = self._state.estimates.given_s(view)
        return given_s is not None and given_s < self._pipeline_s and not view.has_isolated_work

    def _next(self, group: Group, heap: list[_Free]) -> bool:
        """Assign one piece of a group's work, if some worker should run it; return whether."""
        state, now = self._state, self._now
        ending: list[WorkerView] = []
        while heap:
            entry = heapq.heappop(heap)
            view = state.workers[entry.address]
            if not self._has_room(view) or not _is_for(view, group):
                continue
            backlog_s = state.estimates.backlog_s(view, now)
            current = _Free(backlog_s, len(view.running), view.address)
            if current > entry:  # stale: it was assigned other work in this round
                heapq.heappush(heap, current)
                continue
            work = state.ahead.peek(group, view.device)
            if work is None:
                return False
            seconds = (state.estimates.row_s(group, view, now) or 0.0) * work.n_rows
            finish_s = backlog_s + state.estimates.lasting_s(view, seconds, now + backlog_s)
            if math.isinf(finish_s):
                ending.append(view)
            elif self._is_in_time(group, finish_s, work.n_rows):
                self._give(work, view, heap, finish_s)
                return True
        return self._last_resort(group, ending, heap)

    def _give(self, work: Work, view: WorkerView, heap: list[_Free], finish_s: float) -> None:
        """Assign work to a worker, and put the worker back on the heap if it still has room."""
        state, now = self._state, self._now
        state.commit(Assign(work.key, view.address), now, finish_s, work.n_rows)
        if self._has_room(view):
            entry = _Free(state.estimates.backlog_s(view, now), len(view.running), view.address)
            heapq.heappush(heap, entry)
        else:
            state.plans.roomy.pop(view.address, None)

    def _is_in_time(self, group: Group, finish_s: float, n_rows: float) -> bool:
        """Whether finishing in `finish_s` seconds does not delay the end.

        It does if the fastest worker could run the piece after everything else and end sooner.
        """
        state, now = self._state, self._now
        forecast = state.plans.forecasts.get(group)
        if forecast is None or forecast.plan < state.plans.n_plans:
            if forecast is not None:
                # Plenty of work is left, so the end is far away: skip the look at all workers.
                rows_each = state.ahead.n_rows(group) / len(state.workers)
                if finish_s < rows_each * forecast.fastest_row_s:
                    return True
            serving = capacities(state, group, state.candidates(group), now)
            drain = DrainTime(state.ahead.n_rows(group), serving)
            forecast = Forecast(state.plans.n_plans, now + drain.seconds, drain.fastest_row_s)
            state.plans.forecasts[group] = forecast
        latest_at = forecast.drained_at + forecast.fastest_row_s * n_rows
        return now + finish_s <= latest_at + 1e-3 * finish_s

    def _last_resort(self, group: Group, ending: list[WorkerView], heap: list[_Free]) -> bool:
        """Assign work that no worker lasts for to the one that lasts longest.

        Row-wise work journals its finished batches, so this makes progress.
        """
        ending = [view for view in ending if not view.is_draining]
        if not ending:
            return False
        state, now = self._state, self._now
        work = state.ahead.peek(group)
        assert work is not None
        for view in state.candidates(group):
            seconds = (state.estimates.row_s(group, view, now) or 0.0) * work.n_rows
            if view.holds(group.contexts) and now + seconds <= view.ends_at:
                return False  # this worker lasts long enough; wait until it has room
        self._give(work, max(ending, key=lambda view: view.ends_at), heap, math.inf)
        return True


def _is_for(view: WorkerView, group: Group) -> bool:
    """Whether a worker is free for a group: isolated work needs it empty, other work unreserved."""
    if not view.has_rows_left(group):
        return False
    if group.is_isolated:
        is_alone = view.reserved_for is None and not view.waiting
        return not view.running and (is_alone or view.reserved_for == group)
    return view.reserved_for is None


def reserve_workers(state: GateState, now: float) -> None:
    """Reserve a worker for each group of isolated work, so that it runs empty.

    Prefers a worker that lasts for the work; if there is none, the one that lasts longest.
    """
    for view in state.workers.values():
        group = view.reserved_for
        if group is not None and not (
            group in state.ahead.waiting.queues and state.can_serve(view, group)
        ):
            view.reserved_for = None
    for group in state.ahead.waiting.queues:
        if not group.is_isolated:
            continue
        serving = [
            view
            for view in state.candidates(group)
            if view.reserved_for in (None, group) and state.can_serve(view, group)
        ]
        lasting = [view for view in serving if _lasts(state, view, group, now)]
        longest = sorted((v for v in serving if not v.is_draining), key=lambda view: view.ends_at)[
            -1:
        ]
        fit = lasting or longest
        reserved = [view for view in fit if view.reserved_for == group]
        for view in serving:
            view.reserved_for = None
        if fit:
            # Beside what waits for other work only where there is no other: it may wait for this.
            alone = [view for view in fit if not view.waiting] or fit
            best = reserved or [min(alone, key=lambda view: state.estimates.backlog_s(view, now))]
            best[0].reserved_for = group


def may_get_more(state: GateState, view: WorkerView, now: float) -> bool:
    """Whether work that waits or is expected could still end on a worker that is about to end.

    Only what needs contexts that are warm there: it loads no others any more.
    """
    return any(
        state.can_serve(view, group) and _lasts(state, view, group, now)
        for group in state.ahead.groups()
    )


def _lasts(state: GateState, view: WorkerView, group: Group, now: float) -> bool:
    """Whether a worker, once empty, could finish a group's next work before it ends."""
    work = state.ahead.peek(group)
    n_rows = min(_EXPECTED_ROWS, state.ahead.n_rows(group)) if work is None else work.n_rows
    seconds = (state.estimates.row_s(group, view, now) or 0.0) * n_rows
    return now + state.estimates.backlog_s(view, now) + seconds <= view.ends_at
