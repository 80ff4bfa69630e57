"""If the policy stalls, waiting work is assigned as plain Dask would assign it."""

from __future__ import annotations

import math

from dask_pcm.scheduling.actions import Assign, Load
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.rules.device_fit import fits
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier


def stalled(state: GateState, now: float, stall_s: float) -> object | None:
    """The key of stalled work: it waits, workers are idle, and none of them is about to run it.

    Parameters
    ----------
    stall_s
        Seconds without a decision on the group or its contexts after which it counts as stalled.

    Returns
    -------
    object or None
        None if nothing has stalled.
    """
    for group in state.ahead.waiting.queues:
        moved_at = state.plans.moved_at.get(group, -math.inf)
        loaded_at = max(state.plans.moved_at.get(context, -math.inf) for context in group.contexts)
        if now - max(moved_at, loaded_at) < stall_s:
            continue
        workers = [
            view
            for view in state.candidates(group)
            if not view.is_draining and fits(state, view, group)
        ]
        if any(map(_is_idle, workers)) and not any(_is_serving(view, group) for view in workers):
            work = state.ahead.peek(group)
            return work.key if work else None
    return None


def _is_idle(view: WorkerView) -> bool:
    """Whether a worker neither runs nor loads anything, nor makes room once answers have ended."""
    makes_room = bool(view.evicting) and view.n_asked.total() > 0
    return not (view.running or makes_room or Tier.LOADING in view.tiers.values())


def _is_serving(view: WorkerView, group: Group) -> bool:
    """Whether a worker runs work of the same cost, or loads a context for it."""
    is_loading = any(view.tiers.get(c) is Tier.LOADING for c in group.contexts)
    return is_loading or any(other.costs == group.costs for other in view.n_rows)


def assign_as_dask(state: GateState, now: float) -> None:
    """Assign waiting work to idle workers, warm or not; a cold worker loads first."""
    for group in list(state.ahead.waiting.queues):
        idle = [
            view
            for view in state.candidates(group)
            if not view.running and not view.is_draining and fits(state, view, group)
        ]
        for view in idle:
            work = state.ahead.peek(group, view.device)
            if work is None:
                break
            for context in view.missing(group.contexts):
                state.commit(Load(view.address, context), now)
            state.commit(Assign(work.key, view.address), now)
