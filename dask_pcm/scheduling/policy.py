"""``decide``: the one entry to the gate's policy, for the plugin and for the simulator."""

from __future__ import annotations

from dask_pcm.scheduling.events import Action
from dask_pcm.scheduling.eviction import Claims, cool, stay
from dask_pcm.scheduling.placement import place
from dask_pcm.scheduling.state import GateState


def decide(
    state: GateState,
    now: float,
    pipeline_s: float = 0.05,
    n_load_attempts: int = 3,
    idle_s: float | None = None,
) -> list[Action]:
    """Return what to do now; `state` already counts it as done.

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
    state.settle(now)
    claims = Claims.of(state)
    stay(state, claims, now)
    actions: list[Action] = []
    for group in state.groups():
        actions += place(state, group, claims, now, pipeline_s, n_load_attempts)
    if idle_s is not None:
        actions += cool(state, now, idle_s)
    return actions
