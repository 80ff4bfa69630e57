"""Which workers are worth warming: those that would be ready before the work has drained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dask_pcm.scheduling.events import Group, Load
from dask_pcm.scheduling.rules.drain_time import DrainTime, drain_s, offers
from dask_pcm.scheduling.rules.eviction import Demand, make_room, room
from dask_pcm.scheduling.rules.quarantine import device_error, is_hopeful, n_failures
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView

#: A worker changes sides only if all are done within this share of the time.
_GAIN = 0.8


@dataclass(frozen=True, slots=True)
class _Cold:
    """A worker that could be warmed for a group.

    Attributes
    ----------
    ready_s
        Seconds until it would be.
    leaving
        Contexts that would have to make room.
    is_contested
        Whether others have work for these.
    n_failures
        How often what is needed has failed on its node.
    """

    view: WorkerView
    ready_s: float
    leaving: list[str]
    is_contested: bool
    n_failures: int


def warm(
    state: GateState, group: Group, views: Sequence[WorkerView], claims: Demand, now: float
) -> None:
    """Warm cold workers for as long as each would be ready before the work has drained."""
    n_rows = state.rows_ahead(group)
    if not n_rows:
        return
    could = [v for v in views if not v.has(group.contexts) and not v.failed(group.contexts)]
    is_given_up = not state.failures.given_up.isdisjoint(group.contexts)
    if not could and not is_given_up and not is_hopeful(views, group):
        # Every worker has failed to load: that need not be for good. Where it is the device, it is
        # asked again only once it has rested.
        could = [view for view in views if device_error(state, view, group) is None]
    if not could:
        return
    cold = list(_cold(state, group, could, claims, now))
    made = offers(state, group, views, now)
    water = DrainTime(n_rows, made)
    drained_s = water.seconds
    free = [one for one in cold if not one.is_contested]
    if _mean_row_s(state, group, views, now) is None:
        lasting = [one for one in free if now + one.ready_s < one.view.ends_at]
        chosen = _for_each_piece(state, group, views, lasting or free, len(made))
    else:
        chosen = _that_pay(state, group, views, free, water, now)
    if not chosen:
        # Others are at work wherever it could go: one worker at a time changes sides.
        contested = sorted((c for c in cold if c.is_contested), key=lambda c: c.ready_s)
        changing = [one for one in contested if group in one.view.leaving.values()]
        chosen = changing or [
            one for one in contested[:1] if _pays(state, group, one, claims, made, now)
        ]
    for one in chosen:
        view = one.view
        for action in list(make_room(state, view, group, one.leaving)):
            state.decide(action, now)
        if not view.in_use().intersection(one.leaving):
            for context in view.missing(group.contexts):
                state.decide(Load(view.address, context), now, one.ready_s, drained_s)


def _cold(
    state: GateState, group: Group, views: Sequence[WorkerView], claims: Demand, now: float
) -> Iterator[_Cold]:
    for view in views:
        leaving = room(state, view, group, claims, now)
        if view.is_draining or leaving is None:
            continue
        missing_s = sum(state.warm_s(view, context) for context in view.missing(group.contexts))
        ready_s = state.backlog_s(view, now) + state.expected_s(view, missing_s, now)
        urgencies = (claims.urgency(context, view.address) for context in leaving)
        is_contested = any(urgency is not None for urgency in urgencies)
        yield _Cold(view, ready_s, leaving, is_contested, n_failures(state, view, group))


def _mean_row_s(
    state: GateState, group: Group, views: Sequence[WorkerView], now: float
) -> float | None:
    known = [s for view in views if (s := state.row_s(group, view, now)) is not None]
    return sum(known) / len(known) if known else None


def _for_each_piece(
    state: GateState,
    group: Group,
    views: Sequence[WorkerView],
    free: Sequence[_Cold],
    n_offers: int,
) -> list[_Cold]:
    """Nothing is known yet: a worker for each piece of work.

    Where one is warm, it will soon show what a row takes.
    """
    is_warm = any(view.serves(group.contexts) for view in views)
    n_wanted = 0 if is_warm else max(0, state.works_ahead(group) - n_offers)
    if free and all(one.view.failed(group.contexts) is not None for one in free):
        n_wanted = min(n_wanted, 1)  # once more, but not all at once

    def ease(one: _Cold) -> tuple[int, int, int]:
        return one.n_failures, len(one.view.running), len(one.view.tiers)

    return sorted(free, key=ease)[:n_wanted]


def _that_pay(
    state: GateState,
    group: Group,
    views: Sequence[WorkerView],
    free: Sequence[_Cold],
    water: DrainTime,
    now: float,
) -> list[_Cold]:
    """Those that will do a piece before all is done, and before they end; added to `water`."""
    mean_s = _mean_row_s(state, group, views, now)
    assert mean_s is not None
    work = state.peek(group)
    unit_rows = work.n_rows if work else 1.0
    chosen = []
    for one in sorted(free, key=lambda one: (one.n_failures, one.ready_s)):
        row_s = state.row_s(group, one.view, now) or mean_s
        if now + one.ready_s + row_s * unit_rows > one.view.ends_at:
            continue
        if one.ready_s + mean_s * unit_rows >= water.seconds:
            continue
        water.add(one.ready_s, row_s)
        chosen.append(one)
    if not chosen and free and math.isinf(water.seconds):  # nobody lasts, and nobody else is there
        chosen = [max(free, key=lambda one: one.view.ends_at)]
    return chosen


def _pays(
    state: GateState,
    group: Group,
    one: _Cold,
    claims: Demand,
    made: Sequence[tuple[float, float]],
    now: float,
) -> bool:
    """Whether a worker that serves others should serve a group: all would be done sooner.

    A group that nobody serves has its turn in any case.
    """
    if not made:
        return True
    rows_s = [s for s in (state.row_s(group, other, now) for other in state.candidates(group)) if s]
    if not rows_s:
        return False
    view = one.view
    warm_s = sum(state.warm_s(view, context) for context in view.missing(group.contexts))
    own = (warm_s, state.row_s(group, view, now) or sum(rows_s) / len(rows_s))
    n_rows = state.rows_ahead(group)
    before_s, after_s = drain_s(n_rows, made), drain_s(n_rows, [*made, own])
    for rival in claims.groups(one.leaving):
        servers = state.candidates(rival)
        others = [other for other in servers if other is not view]
        n_rows = state.rows_ahead(rival)
        before_s = max(before_s, drain_s(n_rows, offers(state, rival, servers, now)))
        after_s = max(after_s, drain_s(n_rows, offers(state, rival, others, now)))
    return after_s < _GAIN * before_s


def n_threads(n_cores: int, n_neighbors: int) -> int:
    """A worker's share of the cores that it and its neighbors on the host may run on.

    >>> n_threads(8, 2), n_threads(1, 4), n_threads(4, 0)
    (4, 1, 4)
    """
    return max(1, n_cores // max(1, n_neighbors))
