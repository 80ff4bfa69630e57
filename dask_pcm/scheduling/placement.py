"""Earliest finish wins: give work to a warm worker, or warm one where that pays."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from dask_pcm.scheduling.events import Action, Assign, Fail, GivenUp, Group, Standing, Warm, Work
from dask_pcm.scheduling.eviction import Claims, make_room, room, too_large
from dask_pcm.scheduling.state import END_OF_PROCESS, GateState, WorkerView, still_s

#: A worker changes sides only if all are done within this share of the time.
_GAIN = 0.8
#: A context that fails otherwise each time is tried so many times as often.
_PATIENCE = 3


def drain_s(n_rows: float, offers: Sequence[tuple[float, float]]) -> float:
    """Seconds until `n_rows` can be done by workers that each work from some moment on.

    Parameters
    ----------
    n_rows
        Rows to be done.
    offers
        For each worker the seconds until it is ready, and its seconds a row.

    Returns
    -------
    float
        The smallest T with sum(max(0, T - ready) / seconds_per_row) = n_rows: water poured over
        steps. Infinity without offers.

    Examples
    --------
    >>> drain_s(10, [(0.0, 1.0), (4.0, 1.0)])
    7.0
    """
    rate = level = 0.0  # rows a second of all that are ready; rows they would have done by time 0
    finish = float("inf")
    for ready_s, row_s in sorted(offers):
        if ready_s >= finish:
            break
        speed = 1.0 / max(row_s, 1e-9)
        rate, level = rate + speed, level + speed * ready_s
        finish = (n_rows + level) / rate
    return finish


def place(
    state: GateState,
    group: Group,
    claims: Claims,
    now: float,
    pipeline_s: float,
    n_load_attempts: int,
) -> Iterator[Action]:
    """Decide for one group; each action is applied to `state` as it is yielded."""
    views = state.candidates(group)
    for action in list(too_large(state, group, views)):
        state.apply(action, now)
        yield action
    for action in list(_give_up(state, group, views, n_load_attempts)):
        state.apply(action, now)
        yield action
    for action in list(_warm(state, group, views, claims, now)):
        state.apply(action, now)
        yield action
    yield from _assign(state, group, views, now, pipeline_s)


def _assign(
    state: GateState, group: Group, views: Sequence[WorkerView], now: float, pipeline_s: float
) -> Iterator[Action]:
    """Hand out waiting work, each piece to the warm worker that is free first."""
    if state.peek(group) is None:
        return
    serving = [view for view in views if view.serves(group.contexts)]
    # Where nothing is known of how long anything takes, whoever has least comes first.
    free = [
        (state.backlog_s(view, now), len(view.running), view.address)
        for view in serving
        if _has_room(state, view, pipeline_s)
    ]
    if not free:
        return
    latest_s = drain_s(state.rows_ahead(group), _offers(state, group, views, now))
    soonest_s: float | None = None
    heapq.heapify(free)
    while free and (work := state.peek(group)) is not None:
        backlog_s, _, address = heapq.heappop(free)
        view = state.workers[address]
        finish_s = backlog_s + (state.row_s(group, view, now) or 0.0) * work.n_rows
        if finish_s > latest_s * 1.001:
            # A slow worker leaves the last pieces to those who will be done with them sooner.
            if soonest_s is None:
                soonest_s = _soonest(state, group, serving, work, now)
            if finish_s > soonest_s:
                continue
        action = Assign(work.key, address)
        state.apply(action, now)
        yield action
        soonest_s = None
        if _has_room(state, view, pipeline_s):
            heapq.heappush(free, (finish_s, len(view.running), address))


def _has_room(state: GateState, view: WorkerView, pipeline_s: float) -> bool:
    """Whether a worker takes more: a lane is free, or what it has would hardly last."""
    if len(view.running) < view.n_lanes:
        return True
    given_s = state.given_s(view)
    return given_s is not None and given_s < pipeline_s


def _soonest(
    state: GateState, group: Group, serving: Sequence[WorkerView], work: Work, now: float
) -> float:
    """Seconds until the earliest finisher among warm workers would be done with `work`."""
    return min(
        state.backlog_s(view, now) + (state.row_s(group, view, now) or 0.0) * work.n_rows
        for view in serving
    )


def _offers(
    state: GateState, group: Group, views: Sequence[WorkerView], now: float
) -> list[tuple[float, float]]:
    """(seconds until ready, seconds a row) of every worker that is warm or will be."""
    offers = []
    for view in views:
        if view.missing(group.contexts) or view.leaving.keys() & set(group.contexts):
            continue
        ready_s = state.backlog_s(view, now)
        for context in group.contexts:
            since = view.loading_since.get(context)
            if since is not None:
                ready_s += still_s(view.loading_s[context], now - since)
        offers.append((ready_s, state.row_s(group, view, now) or 0.0))
    return offers


def _warm(
    state: GateState, group: Group, views: Sequence[WorkerView], claims: Claims, now: float
) -> Iterator[Action]:
    """Warm cold workers for as long as each would be ready before the work has drained."""
    n_rows = state.rows_ahead(group)
    cold = [view for view in views if _can_load(view, group)]
    if not cold and not _is_hopeful(views, group) and not state.given_up & set(group.contexts):
        cold = list(views)  # every worker has failed to load: that need not be for good
    if not n_rows or not cold:
        return
    plans = {
        view.address: leaving
        for view in cold
        if (leaving := room(state, view, group, claims, now)) is not None
    }
    cold = [view for view in cold if view.address in plans]
    offers = _offers(state, group, views, now)
    row_s = [s for view in views if (s := state.row_s(group, view, now)) is not None]
    mean_s = sum(row_s) / len(row_s) if row_s else None

    def ready_s(view: WorkerView) -> float:
        warm_s = sum(state.warm_s(view, context) for context in view.missing(group.contexts))
        return state.backlog_s(view, now) + warm_s

    def is_contested(view: WorkerView) -> bool:
        leaving = plans[view.address]
        return any(claims.urgency(context, view.address) is not None for context in leaving)

    def ease(view: WorkerView) -> tuple[int, int, int]:
        return _n_failures(state, view, group), len(view.running), len(view.standings)

    free = [view for view in cold if not is_contested(view)]
    free.sort(key=lambda view: (_n_failures(state, view, group), ready_s(view)))
    if mean_s is None:
        # Nothing is known yet: a worker for each piece of work. Where one is warm, it will soon
        # show what a row takes.
        is_warm = any(view.serves(group.contexts) for view in views)
        n_wanted = 0 if is_warm else max(0, state.works_ahead(group) - len(offers))
        if free and all(_failed_context(view, group) is not None for view in free):
            n_wanted = min(n_wanted, 1)  # once more, but not all at once
        chosen = sorted(free, key=ease)[:n_wanted]
    else:
        work = state.peek(group)
        unit_s, chosen = mean_s * (work.n_rows if work else 1.0), []
        for view in free:
            if ready_s(view) + unit_s >= drain_s(n_rows, offers):
                break
            offers.append((ready_s(view), state.row_s(group, view, now) or mean_s))
            chosen.append(view)
    if not chosen:
        # Others are at work wherever it could go: one worker at a time changes sides.
        contested = sorted((view for view in cold if is_contested(view)), key=ready_s)
        changing = [view for view in contested if group in view.leaving.values()]
        chosen = changing or [
            view
            for view in contested[:1]
            if _pays(state, group, view, claims.groups(plans[view.address]), offers, now)
        ]
    for view in chosen:
        leaving = plans[view.address]
        yield from make_room(state, view, group, leaving)
        if not view.in_use().intersection(leaving):
            yield from (Warm(view.address, context) for context in view.missing(group.contexts))


def _pays(
    state: GateState,
    group: Group,
    view: WorkerView,
    rivals: Sequence[Group],
    offers: Sequence[tuple[float, float]],
    now: float,
) -> bool:
    """Whether a worker that serves `rivals` should serve a group: all would be done sooner.

    A group that nobody serves has its turn in any case.
    """
    if not offers:
        return True
    rows_s = [s for s in (state.row_s(group, other, now) for other in state.candidates(group)) if s]
    if not rows_s:
        return False
    warm_s = sum(state.warm_s(view, context) for context in view.missing(group.contexts))
    own = (warm_s, state.row_s(group, view, now) or sum(rows_s) / len(rows_s))
    n_rows = state.rows_ahead(group)
    before_s, after_s = drain_s(n_rows, offers), drain_s(n_rows, [*offers, own])
    for rival in rivals:
        servers = state.candidates(rival)
        others = [other for other in servers if other is not view]
        n_rows = state.rows_ahead(rival)
        before_s = max(before_s, drain_s(n_rows, _offers(state, rival, servers, now)))
        after_s = max(after_s, drain_s(n_rows, _offers(state, rival, others, now)))
    return after_s < _GAIN * before_s


def _can_load(view: WorkerView, group: Group) -> bool:
    return bool(view.missing(group.contexts)) and _failed_context(view, group) is None


def _give_up(
    state: GateState, group: Group, views: Sequence[WorkerView], n_load_attempts: int
) -> Iterator[Action]:
    """Fail the work whose contexts could not be had together, however often it was tried."""
    failed = [context for view in views if (context := _failed_context(view, group)) is not None]
    if not failed or _is_hopeful(views, group):
        return
    worst = max(failed, key=lambda context: len(state.failures.get(context, ())))
    if worst in state.given_up or _has_failed_enough(state, worst, views, n_load_attempts):
        yield from (Fail(key, worst, state.errors[worst]) for key in state.keys(group))
        yield GivenUp(worst)


def _has_failed_enough(
    state: GateState, context: str, views: Sequence[WorkerView], n_load_attempts: int
) -> bool:
    """Whether it failed the same way on so many nodes, as far as there are; or all too often."""
    failures = state.failures.get(context, [])
    if len(failures) >= _PATIENCE * n_load_attempts:
        return True
    n_nodes = min(n_load_attempts, len({view.host for view in views}))
    kinds = {kind for _, kind in failures}
    if state.cost.load_s(context):  # where it has been loaded, whoever ends the process is another
        kinds.discard(END_OF_PROCESS)
    for kind in kinds:
        nodes = [host for host, its_kind in failures if its_kind == kind]
        if len(nodes) >= n_load_attempts and len(set(nodes)) >= n_nodes:
            return True
    return False


def _n_failures(state: GateState, view: WorkerView, group: Group) -> int:
    """How often what a group needs has failed on the node of a worker."""
    return sum(host == view.host for c in group.contexts for host, _ in state.failures.get(c, ()))


def _is_hopeful(views: Sequence[WorkerView], group: Group) -> bool:
    """Whether some worker holds all contexts of a group, or is about to."""
    return any(
        _failed_context(view, group) is None and not view.missing(group.contexts) for view in views
    )


def _failed_context(view: WorkerView, group: Group) -> str | None:
    failed = (c for c in group.contexts if view.standings.get(c) is Standing.FAILED)
    return next(failed, None)
