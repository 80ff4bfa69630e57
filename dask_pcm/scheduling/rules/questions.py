"""Which worker answers a question: one that is warm, with the fewest questions and least work."""

from __future__ import annotations

from collections.abc import Collection

from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView, remaining_s
from dask_pcm.tiers import Tier

#: A worker that ends sooner than this gets no question.
_LEAST_S = 2.0


def choose_worker(
    state: GateState, context: str, now: float, avoided: Collection[str] = ()
) -> str | None:
    """Choose the worker that answers a question; None if none can now.

    A worker that drains is the last choice. One that computes a suspect alone is none, nor is one
    that is to evict the context: what it makes room for has waited for its turn.

    Parameters
    ----------
    avoided
        Workers that could not go on with the question; chosen if there are no others.
    """
    could = [view for view in state.workers.values() if _can_answer(state, view, context, now)]

    def ease(view: WorkerView) -> tuple[bool, bool, int, float]:
        n_rows = sum(view.n_rows.values())
        return view.address in avoided, view.is_draining, view.n_asked.total(), n_rows

    return min(could, key=ease).address if could else None


def _can_answer(state: GateState, view: WorkerView, context: str, now: float) -> bool:
    return (
        view.holds((context,))
        and context not in view.evicting
        and not view.is_paused
        and not view.has_isolated_work
        and view.host not in state.failures.quarantined
        and view.ends_at - now >= _LEAST_S
    )


def warm_in_s(state: GateState, context: str, now: float) -> float | None:
    """Estimated seconds until some worker holds a context; None without workers."""
    seconds = []
    for view in state.candidates(Group((context,), "")):
        tier = view.tiers.get(context)
        if tier is Tier.DEVICE:
            return 0.0
        warm_s = state.estimates.warm_s(view, context)
        if tier is Tier.LOADING and context in view.loading_since:
            expected_s = view.loading_s.get(context, warm_s)
            warm_s = remaining_s(expected_s, now - view.loading_since[context])
        elif view.is_draining:
            continue
        seconds.append(warm_s)
    return min(seconds, default=None)
