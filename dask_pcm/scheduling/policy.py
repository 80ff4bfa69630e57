"""``decide``: the one entry to the gate's policy, for the plugin and for the simulator."""

from __future__ import annotations

from dask_pcm.scheduling.events import Action, Group
from dask_pcm.scheduling.rules.eviction import Demand, cool, stay, too_large
from dask_pcm.scheduling.rules.placement import Placement, keep
from dask_pcm.scheduling.rules.quarantine import give_up, shun
from dask_pcm.scheduling.rules.warming import warm
from dask_pcm.scheduling.state.state import GateState

#: So many pairs of a group and a worker are looked at whenever something is decided; where there
#: are more, all are looked at so much less often, for each.
_FEW, _LOOK_S, _LONGEST_S = 100, 1e-4, 2.0


def decide(
    state: GateState,
    now: float,
    pipeline_s: float = 0.05,
    n_load_attempts: int = 3,
    idle_s: float | None = None,
) -> list[Action]:
    """Return what to do now; `state` already counts it as done.

    Whatever has happened, the workers that it has happened to are given work at once. What needs a
    look at every worker (whom to warm, what is to make room, what holds up the end) is decided each
    time in a small world, and in a large one from time to time: with 10,000 workers once a second.

    Parameters
    ----------
    state
        The picture of the world; costs are learned and actions applied in place.
    now
        Seconds on any clock that never goes back.
    pipeline_s
        Seconds of work that a worker is given ahead of what it does.
    n_load_attempts
        Workers on which a context may fail to load before its work fails.
    idle_s
        Seconds after which a context that nobody uses leaves its worker; None for never.
    """
    state.actions = []
    state.settle(now)
    is_due = now - state.planned_at >= min(_LONGEST_S, (state.n_looks - _FEW) * _LOOK_S)
    if is_due:
        _plan(state, now, n_load_attempts)
        views = list(state.workers.values())
    else:
        names = {**state.changed, **state.roomy} if state.has_new_work else state.changed
        views = [state.workers[name] for name in names if name in state.workers]
    state.changed.clear()
    state.has_new_work = False
    if state.waiting.queues:
        Placement(state, now, pipeline_s).assign(views)
    if is_due and idle_s is not None:
        cool(state, now, idle_s)
    return state.actions


def _plan(state: GateState, now: float, n_load_attempts: int) -> None:
    """What cannot be done any more is failed, and workers are warmed for the rest."""
    for shunned in list(shun(state, now)):
        state.decide(shunned, now)
    claims = Demand.of(state)
    stay(state, claims, now)
    keep(state, now)
    groups = state.groups()
    for group in state.forecasts.keys() - set(groups):
        del state.forecasts[group]
    for about in [one for one in state.moved_at if isinstance(one, Group)]:
        if about not in state.waiting.queues:
            del state.moved_at[about]
    n_looks = len(state.workers)
    for group in groups:
        views = state.candidates(group)
        n_looks += len(views)
        ended = [*too_large(state, group, views), *give_up(state, group, views, n_load_attempts)]
        for action in dict.fromkeys(ended):
            state.decide(action, now)
        warm(state, group, views, claims, now)
    state.planned_at, state.n_looks = now, n_looks
    state.n_plans += 1
