"""``decide``: the only entry point of the gate's policy, for the plugin and the simulator."""

from __future__ import annotations

from dask_pcm.scheduling.actions import Action
from dask_pcm.scheduling.rules.device_fit import fail_too_large
from dask_pcm.scheduling.rules.eviction import Demand, cancel_evictions, offload_idle
from dask_pcm.scheduling.rules.placement import Placement, reserve_workers
from dask_pcm.scheduling.rules.quarantine import give_up, quarantine_nodes
from dask_pcm.scheduling.rules.rules import Rules
from dask_pcm.scheduling.rules.time_limit import fail_too_slow
from dask_pcm.scheduling.rules.warming import warm
from dask_pcm.scheduling.state.state import GateState

#: The rules where nothing is set.
DEFAULTS = Rules()


def decide(state: GateState, now: float, rules: Rules = DEFAULTS) -> list[Action]:
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
    rules
        The settings that change what is decided.

    Returns
    -------
    list of Action
        In the order in which they must be carried out.
    """
    plans = state.plans
    plans.actions = []
    for name in plans.changed:
        state.estimates.settle(state.workers[name], now)
    is_due = plans.is_due(now)
    if is_due:
        _plan(state, now, rules)
        workers = list(state.workers.values())
    else:
        names = plans.to_look_at()
        workers = [state.workers[name] for name in names]
    plans.begin_round()
    if state.ahead.waiting.queues:
        Placement(state, now, rules.pipeline_s).assign(workers)
    if is_due and rules.idle_s is not None:
        offload_idle(state, now, rules.idle_s)
    return plans.actions


def _plan(state: GateState, now: float, rules: Rules) -> None:
    """Fail work that cannot be done, and warm workers for the rest."""
    for quarantine in list(quarantine_nodes(state, now)):
        state.commit(quarantine, now)
    demand = Demand.of(state)
    cancel_evictions(state, demand, now)
    reserve_workers(state, now)
    groups = state.ahead.groups()
    state.plans.forget_groups(groups, state.ahead.waiting.queues)
    n_looks = len(state.workers)
    for group in groups:
        workers = state.candidates(group)
        n_looks += len(workers)
        ended = [
            *fail_too_large(state, group, workers),
            *fail_too_slow(state, group, workers, rules.n_load_attempts),
            *give_up(state, group, workers, rules.n_load_attempts),
        ]
        for action in dict.fromkeys(ended):  # both rules may fail the same work
            state.commit(action, now)
        warm(state, group, workers, demand, now)
    state.plans.record_plan(now, n_looks)
