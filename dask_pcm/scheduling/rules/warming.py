"""Warm a worker if it would be ready before the group's work has drained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dask_pcm.scheduling.actions import Load
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.rules.drain_time import DrainTime, capacities, drain_s
from dask_pcm.scheduling.rules.eviction import Demand, find_victims, make_room
from dask_pcm.scheduling.rules.placer import planned_hosts
from dask_pcm.scheduling.rules.quarantine import device_error, is_hopeful, n_failures
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView

#: A worker that serves others changes over only if all work then drains within this share of the
#: time that it would take otherwise.
_GAIN = 0.8
#: A worker where the plan of hosts does not have a context counts as if it took longer to warm.
_OFF_PLAN = 1.25


@dataclass(frozen=True, slots=True)
class _Cold:
    """A worker that could be warmed for a group.

    Attributes
    ----------
    ready_s
        Seconds until it would be warm.
    evicting
        Contexts that would be evicted.
    is_contested
        Whether one of these has waiting work.
    n_failures
        Failed loads of the group's contexts on its node.
    is_planned
        Whether it is where the plan of hosts has the group's contexts.
    """

    view: WorkerView
    ready_s: float
    evicting: list[str]
    is_contested: bool
    n_failures: int
    is_planned: bool

    @property
    def rank(self) -> tuple[int, float]:
        """The lowest is warmed first."""
        return self.n_failures, self.ready_s * (1.0 if self.is_planned else _OFF_PLAN)


def warm(
    state: GateState, group: Group, workers: Sequence[WorkerView], demand: Demand, now: float
) -> None:
    """Warm cold workers, one more as long as it would be ready before the work has drained."""
    n_rows = state.ahead.n_rows(group)
    if not n_rows:
        return
    could = [v for v in workers if not v.has(group.contexts) and not v.failed(group.contexts)]
    is_given_up = not state.failures.given_up.isdisjoint(group.contexts)
    if not could and not is_given_up and not is_hopeful(workers, group):
        # Every worker has failed to load, perhaps for a transient reason: try again. A device
        # that cannot be used is tried again only after its back-off.
        could = [view for view in workers if device_error(state, view, group) is None]
    if not could:
        return
    cold = list(_cold(state, group, could, demand, now))
    serving = capacities(state, group, workers, now)
    drain = DrainTime(n_rows, serving)
    drained_s = drain.seconds
    free = [one for one in cold if not one.is_contested]
    if _mean_row_s(state, group, workers, now) is None:
        lasting = [one for one in free if now + one.ready_s < one.view.ends_at]
        chosen = _for_each_piece(state, group, workers, lasting or free, len(serving), now)
    else:
        chosen = _that_pay(state, group, workers, free, drain, now)
    if not chosen:
        # Every possible worker serves others: change over one at a time, so that the next plan
        # sees the effect before it takes another.
        contested = sorted((c for c in cold if c.is_contested), key=lambda c: c.ready_s)
        changing = [one for one in contested if group in one.view.evicting.values()]
        chosen = changing or [
            one for one in contested[:1] if _pays(state, group, one, demand, serving, now)
        ]
    for one in chosen:
        view = one.view
        for action in list(make_room(state, view, group, one.evicting)):
            state.commit(action, now)
        if not view.in_use().intersection(one.evicting):
            for context in view.missing(group.contexts):
                state.commit(Load(view.address, context), now, one.ready_s, drained_s)


def _cold(
    state: GateState, group: Group, workers: Sequence[WorkerView], demand: Demand, now: float
) -> Iterator[_Cold]:
    has_more = planned_hosts(state, group.contexts)
    for view in workers:
        evicting = find_victims(state, view, group, demand, now)
        if view.is_draining or evicting is None:
            continue
        missing_s = sum(
            state.estimates.warm_s(view, context) for context in view.missing(group.contexts)
        )
        ready_s = state.estimates.backlog_s(view, now) + state.estimates.expected_s(
            view, missing_s, now
        )
        urgencies = (demand.urgency(context, view.address) for context in evicting)
        is_contested = any(urgency is not None for urgency in urgencies)
        is_planned = has_more(view.host)
        failed = n_failures(state, view, group)
        yield _Cold(view, ready_s, evicting, is_contested, failed, is_planned)


def _mean_row_s(
    state: GateState, group: Group, workers: Sequence[WorkerView], now: float
) -> float | None:
    known = [s for view in workers if (s := state.estimates.row_s(group, view, now)) is not None]
    return sum(known) / len(known) if known else None


def _for_each_piece(
    state: GateState,
    group: Group,
    workers: Sequence[WorkerView],
    free: Sequence[_Cold],
    n_serving: int,
    now: float,
) -> list[_Cold]:
    """Choose one worker per piece of work, while the cost of a row is unknown.

    None if some worker is warm already: it will soon measure the cost. A warm one that is busy with
    other work will not; a cold one that is ready before it is chosen all the same.
    """
    warm = [view for view in workers if view.serves(group.contexts)]
    busy = [view for view in warm if _is_busy_with_others(view, group)]
    if busy:
        soonest_s = min(state.estimates.backlog_s(view, now) for view in busy)
        free = [one for one in free if one.ready_s < soonest_s]
        n_serving -= len(capacities(state, group, busy, now))
    n_wanted = max(0, state.ahead.n_works(group) - n_serving) if len(busy) == len(warm) else 0
    if free and all(one.view.failed(group.contexts) is not None for one in free):
        n_wanted = min(n_wanted, 1)  # retry on one worker only

    def ease(one: _Cold) -> tuple[int, bool, int, int]:
        is_off = not one.is_planned
        return one.n_failures, is_off, len(one.view.running), len(one.view.tiers)

    return sorted(free, key=ease)[:n_wanted]


def _is_busy_with_others(view: WorkerView, group: Group) -> bool:
    """Whether a worker has no room for a group's work, and runs none of it."""
    return view.n_on_lanes >= view.n_lanes and not view.n_rows.get(group)


def _that_pay(
    state: GateState,
    group: Group,
    workers: Sequence[WorkerView],
    free: Sequence[_Cold],
    drain: DrainTime,
    now: float,
) -> list[_Cold]:
    """Choose workers that would finish a unit before the work has drained and before they end.

    Each one chosen is added to `drain`, so the next must be ready before an earlier drain time.
    """
    mean_s = _mean_row_s(state, group, workers, now)
    assert mean_s is not None
    work = state.ahead.peek(group)
    unit_rows = work.n_rows if work else 1.0
    chosen = []
    for one in sorted(free, key=lambda one: one.rank):
        row_s = state.estimates.row_s(group, one.view, now) or mean_s
        if now + one.ready_s + row_s * unit_rows > one.view.ends_at:
            continue
        if one.ready_s + mean_s * unit_rows >= drain.seconds:
            continue
        drain.add(one.ready_s, row_s)
        chosen.append(one)
    if not chosen and free and math.isinf(drain.seconds):
        # No worker lasts for a unit and none is warm: the one that lasts longest makes progress.
        chosen = [max(free, key=lambda one: one.view.ends_at)]
    return chosen


def _pays(
    state: GateState,
    group: Group,
    one: _Cold,
    demand: Demand,
    serving: Sequence[tuple[float, float]],
    now: float,
) -> bool:
    """Whether a worker that serves others should change over to `group`: all drain sooner.

    Always, if no worker serves the group: its turn has come (see ``eviction``).
    """
    if not serving:
        return True
    rows_s = [
        s
        for s in (state.estimates.row_s(group, other, now) for other in state.candidates(group))
        if s
    ]
    if not rows_s:
        return False
    view = one.view
    warm_s = sum(state.estimates.warm_s(view, context) for context in view.missing(group.contexts))
    own = (warm_s, state.estimates.row_s(group, view, now) or sum(rows_s) / len(rows_s))
    n_rows = state.ahead.n_rows(group)
    before_s, after_s = drain_s(n_rows, serving), drain_s(n_rows, [*serving, own])
    for rival in demand.groups(one.evicting):
        servers = state.candidates(rival)
        others = [other for other in servers if other is not view]
        n_rows = state.ahead.n_rows(rival)
        before_s = max(before_s, drain_s(n_rows, capacities(state, rival, servers, now)))
        after_s = max(after_s, drain_s(n_rows, capacities(state, rival, others, now)))
    return after_s < _GAIN * before_s


def n_threads(n_cores: int, n_neighbors: int) -> int:
    """Threads for one of `n_neighbors` workers that share `n_cores` cores of a host.

    >>> n_threads(8, 2), n_threads(1, 4), n_threads(4, 0)
    (4, 1, 4)
    """
    return max(1, n_cores // max(1, n_neighbors))
