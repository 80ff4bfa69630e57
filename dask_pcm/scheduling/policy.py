"""``decide``: the only entry point of the gate's policy, for the plugin and the simulator."""

from __future__ import annotations

from dask_pcm.scheduling.events import Action, Group
from dask_pcm.scheduling.rules.eviction import (
    Demand,
    cancel_evictions,
    fail_too_large,
    offload_idle,
)
from dask_pcm.scheduling.rules.placement import Placement, reserve_workers
from dask_pcm.scheduling.rules.quarantine import give_up, quarantine_nodes
from dask_pcm.scheduling.rules.warming import warm
from dask_pcm.scheduling.state.state import GateState

#: Up to `_FEW` pairs of a group and a worker, every decision plans anew. Each further pair adds
#: `_LOOK_S` seconds between plans, `_LONGEST_S` at most.
_FEW, _LOOK_S, _LONGEST_S = 100, 1e-4, 2.0


def decide(
    state: GateState,
    now: float,
    pipeline_s: float = 0.05,
    n_load_attempts: int = 3,
    idle_s: float | None = None,
) -> list[Action]:
    """Return the actions to carry out now; they are already applied to `state`.

    Workers with an event since the last call are assigned work at once. Planning looks at every
    worker: which to warm, what to evict, what would delay the end. A small cluster is planned at
    every call, a large one periodically: 10,000 workers about once a second.

    Parameters
    ----------
    state
        Updated in place: costs are learned and actions applied.
    now
        Seconds of a monotonic clock.
    pipeline_s
        Seconds of work assigned to a worker beyond the work that fills its lanes.
    n_load_attempts
        Failed loads of a context, on as many nodes if there are, after which its work fails.
    idle_s
        Seconds unused after which a context is offloaded; None for never.

    Returns
    -------
    list of Action
        In the order in which they must be carried out.
    """
    state.actions = []
    state.settle(now)
    is_due = now - state.planned_at >= min(_LONGEST_S, (state.n_looks - _FEW) * _LOOK_S)
    if is_due:
        _plan(state, now, n_load_attempts)
        workers = list(state.workers.values())
    else:
        # A group that had no work may suit workers that had room left, so look at these as well.
        names = {**state.changed, **state.roomy} if state.has_new_work else state.changed
        workers = [state.workers[name] for name in names if name in state.workers]
    state.changed.clear()
    state.has_new_work = False
    if state.waiting.queues:
        Placement(state, now, pipeline_s).assign(workers)
    if is_due and idle_s is not None:
        offload_idle(state, now, idle_s)
    return state.actions


def _plan(state: GateState, now: float, n_load_attempts: int) -> None:
    """Fail work that cannot be done, and warm workers for the rest."""
    for quarantine in list(quarantine_nodes(state, now)):
        state.commit(quarantine, now)
    demand = Demand.of(state)
    cancel_evictions(state, demand, now)
    reserve_workers(state, now)
    groups = state.groups()
    for group in state.forecasts.keys() - set(groups):
        del state.forecasts[group]
    for moved in [key for key in state.moved_at if isinstance(key, Group)]:
        if moved not in state.waiting.queues:
            del state.moved_at[moved]
    n_looks = len(state.workers)
    for group in groups:
        workers = state.candidates(group)
        n_looks += len(workers)
        ended = [
            *fail_too_large(state, group, workers),
            *give_up(state, group, workers, n_load_attempts),
        ]
        for action in dict.fromkeys(ended):  # both rules may fail the same work
            state.commit(action, now)
        warm(state, group, workers, demand, now)
    state.planned_at, state.n_looks = now, n_looks
    state.n_plans += 1
