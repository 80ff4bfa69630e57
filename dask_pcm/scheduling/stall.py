"""What the gate does where its policy does nothing: notice it, and assign as plain Dask would."""

from __future__ import annotations

from dask_pcm.scheduling.events import Assign, Standing, Warm
from dask_pcm.scheduling.state import GateState
from dask_pcm.scheduling.views import WorkerView


def stalled(state: GateState, now: float, stall_s: float) -> object | None:
    """The key of work that waits while its workers idle and nothing is planned; else None.

    Parameters
    ----------
    stall_s
        Seconds without a decision after which that is no coincidence.
    """
    if now - state.last_change_at < stall_s:
        return None
    for group in state.waiting.queues:
        views = [view for view in state.candidates(group) if not view.is_told]
        if views and all(_is_idle(view) for view in views):
            work = state.peek(group)
            return work.key if work else None
    return None


def _is_idle(view: WorkerView) -> bool:
    return not view.running and Standing.LOADING not in view.standings.values()


def assign_plainly(state: GateState, now: float) -> None:
    """Give what waits to idle workers, warm or not: they load first where they have to."""
    for group in list(state.waiting.queues):
        idle = [view for view in state.candidates(group) if not view.running]
        for view in idle:
            work = state.peek(group, view.device)
            if work is None:
                break
            for context in view.missing(group.contexts):
                state.decide(Warm(view.address, context), now)
            state.decide(Assign(work.key, view.address), now)
