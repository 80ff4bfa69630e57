"""Eviction: a context leaves a device for another with waiting work, or after its idle time.

A context without waiting work is evicted at once, the least valuable first. Contexts that both
have work take turns. A turn lasts several times as long as moving both contexts, so that moves
stay a small part of the total time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dask_pcm.scheduling.actions import Action, Offload, Vacate
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier

#: Length of a turn, as a multiple of the time that moving takes.
TURNS = 4.0
#: Shortest turn, in seconds.
_MIN_TURN_S = 0.5
#: Seconds unused after which the value of a context has halved.
_HALF_LIFE_S = 60.0


@dataclass(frozen=True, slots=True)
class Demand:
    """Contexts with work ahead, and its urgency on each worker; built once per planning round.

    Valid for the whole round: no group is added meanwhile, and queues that shrink are looked up
    at each call.
    """

    state: GateState
    #: Groups that had work ahead when this was built.
    by_context: dict[str, list[Group]]
    #: Groups to which runs will still submit; only an event changes that.
    expected: frozenset[Group]

    @classmethod
    def of(cls, state: GateState) -> Demand:
        """Build the demand of the current state."""
        by_context: dict[str, list[Group]] = {}
        for group in state.ahead.groups():
            for context in dict.fromkeys(group.contexts):
                by_context.setdefault(context, []).append(group)
        return cls(state, by_context, frozenset(state.ahead.runs.expected_groups()))

    def urgency(self, context: str, worker: str) -> tuple[float, ...] | None:
        """Priority of the first work that needs a context and may run on a worker.

        None without such work. Empty for work that is only expected, so that it sorts first.
        """
        groups = self.by_context.get(context, ())
        found = (self._urgency_of(g) for g in groups if not g.allowed or worker in g.allowed)
        return min((priority for priority in found if priority is not None), default=None)

    def groups(self, contexts: Sequence[str]) -> list[Group]:
        """Groups with work ahead that need one of `contexts`."""
        found = (group for context in contexts for group in self.by_context.get(context, ()))
        return [group for group in dict.fromkeys(found) if self._urgency_of(group) is not None]

    def _urgency_of(self, group: Group) -> tuple[float, ...] | None:
        work = self.state.ahead.peek(group)
        if work is not None:
            return work.priority
        return () if group in self.expected else None


def find_victims(
    state: GateState, view: WorkerView, group: Group, demand: Demand, now: float
) -> list[str] | None:
    """Contexts to evict from a worker so that all contexts of a group fit.

    Returns
    -------
    list of str, or None
        The least valuable first; empty if all fit already. None if they cannot fit, or if the
        turn of the contexts in their way is not over.
    """
    missing_bytes = sum(state.contexts.size(context) for context in view.missing(group.contexts))
    lacking = missing_bytes - view.free_bytes
    if lacking <= 0:
        return []
    rivals = [
        context
        for context, tier in view.tiers.items()
        if tier is Tier.DEVICE and context not in group.contexts
    ]
    evicting: list[str] = []
    for context in sorted(rivals, key=lambda c: _worth(state, view, c, demand, now)):
        if lacking <= 0:
            break
        # Space that another group is about to get must not be given away twice.
        is_promised = view.evicting.get(context, group) != group
        if not is_promised and _can_evict(state, view, context, group, demand, now):
            evicting.append(context)
            lacking -= state.contexts.size(context)
    return evicting if lacking <= 0 else None


def make_room(
    state: GateState, view: WorkerView, group: Group, evicting: Sequence[str]
) -> Iterator[Action]:
    """Evict contexts: at once, or if assigned work needs one, as soon as that has ended."""
    in_use = view.in_use()
    if not in_use.intersection(evicting):
        yield from (Offload(view.address, context) for context in evicting)
        return
    for context in evicting:
        if context not in view.evicting:
            yield Vacate(view.address, context, group)


def _worth(
    state: GateState, view: WorkerView, context: str, demand: Demand, now: float
) -> tuple[bool, tuple[float, ...], float]:
    """Sort key of a context's value: with waiting work or not, then seconds saved per byte.

    Among contexts with waiting work the one needed last is worth least, as in Belady's optimal
    replacement. Seconds to restore decay with the time unused.
    """
    urgency = demand.urgency(context, view.address)
    idle_s = now - view.used_at.get(context, now)
    back_s = max(state.estimates.cost.restore_s(context, view.device), 1e-3)
    seconds = back_s * 0.5 ** (idle_s / _HALF_LIFE_S) / max(state.contexts.size(context), 1)
    return urgency is not None, tuple(-number for number in urgency or ()), seconds


def _can_evict(
    state: GateState, view: WorkerView, context: str, group: Group, demand: Demand, now: float
) -> bool:
    """Whether a context may be evicted for a group: it has no work, less priority, or its turn
    is over.
    """
    rival = demand.urgency(context, view.address)
    if rival is None:
        return True
    work = state.ahead.peek(group)
    own = work.priority if work is not None else ()
    if own and rival and own[0] != rival[0]:  # the user's own priority precedes turns
        return own[0] < rival[0]
    moving_s = state.estimates.cost.restore_s(context, view.device) + sum(
        state.estimates.warm_s(view, missing) for missing in view.missing(group.contexts)
    )
    turn_s = now - view.warm_since.get(context, now)
    return turn_s >= max(_MIN_TURN_S, TURNS * moving_s)


def cancel_evictions(state: GateState, demand: Demand, now: float) -> None:
    """Cancel pending evictions whose group has no work ahead, needs no room, or lost its turn."""
    for view in state.workers.values():
        for group in list(dict.fromkeys(view.evicting.values())):
            is_over = not state.ahead.n_rows(group) or not view.missing(group.contexts)
            # An urgent request for a context on the way out can take its turn back.
            needed = [] if is_over else find_victims(state, view, group, demand, now) or []
            promised = [context for context, whom in view.evicting.items() if whom == group]
            for context in promised:
                if context not in needed:
                    del view.evicting[context]


def offload_idle(state: GateState, now: float, idle_s: float) -> None:
    """Offload contexts that have been warm and unused for `idle_s` seconds.

    Contexts that waiting or expected work needs stay on the device.
    """
    wanted = {context for group in state.ahead.groups() for context in group.contexts}
    for view in state.workers.values():
        wanted_here = view.in_use() | wanted
        for context, tier in list(view.tiers.items()):
            is_idle = now - view.used_at.get(context, now) >= idle_s
            if tier is Tier.DEVICE and is_idle and context not in wanted_here:
                state.commit(Offload(view.address, context), now)
