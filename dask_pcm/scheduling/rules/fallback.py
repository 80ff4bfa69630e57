"""What the gate does where its policy does nothing: notice it, and assign as plain Dask would."""

from __future__ import annotations

import math

from dask_pcm.scheduling.events import Assign, Group, Load
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier


def stalled(state: GateState, now: float, stall_s: float) -> object | None:
    """The key of work that waits while workers idle and nothing is planned for it; else None.

    Parameters
    ----------
    stall_s
        Seconds without a decision after which that is no coincidence.
    """
    for group in state.waiting.queues:
        moved_at = state.moved_at.get(group, -math.inf)
        loaded_at = max(state.moved_at.get(context, -math.inf) for context in group.contexts)
        if now - max(moved_at, loaded_at) < stall_s:
            continue
        views = [view for view in state.candidates(group) if not view.is_draining]
        if any(map(_is_idle, views)) and not any(_is_at_it(view, group) for view in views):
            work = state.peek(group)
            return work.key if work else None
    return None


def _is_idle(view: WorkerView) -> bool:
    return not view.running and Tier.LOADING not in view.tiers.values()


def _is_at_it(view: WorkerView, group: Group) -> bool:
    """Whether a worker does what is alike, or is about to."""
    is_loading = any(view.tiers.get(c) is Tier.LOADING for c in group.contexts)
    return is_loading or any(other.costs == group.costs for other in view.n_rows)


def assign_as_dask(state: GateState, now: float) -> None:
    """Give what waits to idle workers, warm or not: they load first where they have to."""
    for group in list(state.waiting.queues):
        idle = [v for v in state.candidates(group) if not v.running and not v.is_draining]
        for view in idle:
            work = state.peek(group, view.device)
            if work is None:
                break
            for context in view.missing(group.contexts):
                state.decide(Load(view.address, context), now)
            state.decide(Assign(work.key, view.address), now)
