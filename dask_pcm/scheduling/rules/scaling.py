"""Scaling: how many workers the known work needs, and which existing workers it still needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.rules.device_fit import fits_pool
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier

#: A pool whose workers live shorter than they take to warm is not worthless: its share of useful
#: life, as an exponent, is no smaller.
_MOST_LOST = 3.0


def n_workers_wanted(state: GateState, target_s: float) -> int:
    """Number of workers that would finish all known work within `target_s` seconds.

    If a load takes longer than `target_s`, its duration is the target: a worker that becomes ready
    after the work has drained is useless. While the cost of a row is unknown, each piece of work
    counts as one worker, as in ``warming``. Workers that answer questions stay.
    """
    working = (group for view in state.workers.values() for group in view.n_works)
    groups = dict.fromkeys([*state.ahead.groups(), *working])
    n_asked = sum(bool(view.n_asked) for view in state.workers.values())
    return max(n_asked, math.ceil(sum(_share(state, group, target_s) for group in groups)))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a pool can give.

    Attributes
    ----------
    most
        Its workers at most.
    n_here
        Those that it has.
    n_asked
        Those that it has, or has been asked for.
    n_counted
        Those that can be counted on; fewer than asked for if it is slow to give more.
    wait_s
        What its jobs have waited in the queue, in seconds.
    """

    most: float
    n_here: int = 0
    n_asked: int = 0
    n_counted: float = math.inf
    wait_s: float = 0.0


def spread(
    state: GateState,
    n_workers: float,
    offers: Mapping[str, Offer],
    now: float,
    work_s: float = math.inf,
) -> dict[str, int]:
    """Which pools are to have the workers that the work is worth.

    Those that are there, or were asked for, come first: estimates change with every batch, and
    workers that come and go with them would only load. More are wanted of the best pools.

    Before all else goes whether the work fits their devices: a pool that can do all of it precedes
    one that can do some, and one that can do none of it gets no workers. Then go speed and the
    share of a life that is left after warming. What a pool cannot be counted on for is wanted of
    other pools as well. A pool whose jobs would begin after the work has ended gets no more.

    Parameters
    ----------
    n_workers
        Workers of mean speed that are wanted, of all pools together.
    work_s
        What the work would take one worker of mean speed, in seconds; without meaning while the
        cost of a row is unknown.
    """
    worth = {pool: _useful(state, pool, now) / _slowness(state, pool) for pool in offers}
    groups = list(state.ahead.groups())
    n_unfit = {pool: sum(not fits_pool(state, pool, g) for g in groups) for pool in offers}
    at_work = sum(offer.n_here * worth[pool] for pool, offer in offers.items())
    is_known = all(_row_s(state, group) is not None for group in groups)
    left_s = work_s / at_work if at_work and is_known else math.inf
    best = sorted(offers, key=lambda pool: (n_unfit[pool], -worth[pool]))
    most = {
        pool: 0 if groups and n_unfit[pool] == len(groups) else offers[pool].most for pool in best
    }
    found = dict.fromkeys(best, 0)
    for is_more in (False, True):
        for pool in best:
            offer = offers[pool]
            known = offer.n_here if offer.wait_s > left_s else max(offer.n_here, offer.n_asked)
            is_open = is_more and offer.wait_s <= left_s
            limit = most[pool] if is_open else min(most[pool], known)
            wanted = math.ceil(max(0.0, n_workers) / worth[pool] - 1e-9)
            n = int(max(0, min(limit - found[pool], wanted)))
            counted = min(found[pool] + n, offer.n_counted) - min(found[pool], offer.n_counted)
            found[pool] += n
            n_workers -= counted * worth[pool]
    return found


def _useful(state: GateState, pool: str, now: float) -> float:
    """The share of a worker's life that is left after warming, for exponential lifetimes."""
    lives = state.estimates.pools.get(pool)
    if lives is None:
        return 1.0
    return math.exp(-min(_MOST_LOST, lives.hazard(now) * _longest_warm_s(state)))


def _longest_warm_s(state: GateState) -> float:
    """What a new worker needs before its first row, for any work that is known, in seconds."""
    groups = state.ahead.groups()
    return max((sum(_warm_s(state, c) for c in group.contexts) for group in groups), default=0.0)


def _slowness(state: GateState, pool: str) -> float:
    """Seconds per row on workers of a pool, over the mean of all workers; 1.0 if not known."""
    ratios = []
    for group in state.ahead.groups():
        mean = _row_s(state, group)
        views = [view for view in state.workers.values() if view.pool == pool]
        known = [state.estimates.cost.row_s(group.costs, v.address, v.device) for v in views]
        mine = [seconds for seconds in known if seconds is not None]
        if mean and mine:
            ratios.append(sum(mine) / len(mine) / mean)
    return sum(ratios) / len(ratios) if ratios else 1.0


def needed_workers(state: GateState, workers: Iterable[str]) -> set[str]:
    """Of `workers`, those that ``is_needed``."""
    views = ((worker, state.workers.get(worker)) for worker in workers)
    return {worker for worker, view in views if view is not None and is_needed(state, view)}


def is_needed(state: GateState, view: WorkerView) -> bool:
    """Whether it loads, runs work, answers questions, or is warm for waiting or expected work."""
    is_busy = view.running or view.waiting or view.n_asked
    if is_busy or Tier.LOADING in view.tiers.values():
        return True
    wanted = {context for group in state.ahead.groups() for context in group.contexts}
    return any(tier is Tier.DEVICE and context in wanted for context, tier in view.tiers.items())


def _share(state: GateState, group: Group, target_s: float) -> float:
    """Workers that one group needs, as a fraction."""
    views = state.workers.values()
    n_works = sum(view.n_works.get(group, 0) for view in views)
    queue = state.ahead.waiting.queues.get(group)
    n_works += queue.n_works if queue else 0
    runs = state.ahead.runs.of_group(group)
    row_s = _row_s(state, group)
    if row_s is None:
        return float(max(n_works, sum(run.n_units for run in runs)))
    n_rows = state.ahead.n_rows(group) + sum(view.n_rows.get(group, 0.0) for view in views)
    warm_s = sum(_warm_s(state, context) for context in group.contexts)
    n_apart = n_works + sum(run.n_rows for run in runs)  # no more workers than pieces
    return min(n_apart, n_rows * row_s / max(target_s, warm_s, 1e-9))


def _row_s(state: GateState, group: Group) -> float | None:
    """Mean learned seconds per row over the candidates; without any, over all devices seen."""
    views = state.candidates(group)
    known = [state.estimates.cost.row_s(group.costs, view.address, view.device) for view in views]
    if not views and group.costs in state.estimates.cost.rows:
        known = [rate.value for rate in state.estimates.cost.rows[group.costs].rates.values()]
    found = [seconds for seconds in known if seconds is not None]
    return sum(found) / len(found) if found else None


def _warm_s(state: GateState, context: str) -> float:
    """Estimated seconds to warm a new worker of an unknown device model."""
    load_s = state.estimates.cost.load_s(context, "", state.contexts.size(context))
    return load_s + state.estimates.cost.stage_s(context, state.contexts.file_bytes.get(context, 0))
