"""What leaves a device, and when: for others with work waiting, or because nobody has used it.

A context that nobody waits for makes room at once, the one least worth keeping first. Two that
both have work take turns: one stays until its turn has been several times as long as it takes to
bring back both, so that what is spent on moving them is a small part of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dask_pcm.scheduling.events import Action, Fail, Group, Offload, Vacate
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier

#: A turn lasts so many times what moving takes.
TURNS = 4.0
#: And at least so long.
_MIN_TURN_S = 0.5
#: Seconds unused after which a context is worth half as much.
_HALF_LIFE_S = 60.0


@dataclass(frozen=True, slots=True)
class Demand:
    """Which contexts work waits for, how urgently and where; made once for each decision.

    While one is made no group comes. What waits in each gets less, and is looked up when asked.
    """

    state: GateState
    #: Groups that had work ahead when this was made.
    by_context: dict[str, list[Group]]
    #: Groups of runs: for them there is work ahead until the next event.
    expected: frozenset[Group]

    @classmethod
    def of(cls, state: GateState) -> Demand:
        by_context: dict[str, list[Group]] = {}
        for group in state.groups():
            for context in dict.fromkeys(group.contexts):
                by_context.setdefault(context, []).append(group)
        expected = frozenset(run.group for run in state.runs.values() if run.n_rows > 0)
        return cls(state, by_context, expected)

    def urgency(self, context: str, worker: str) -> tuple[float, ...] | None:
        """Priority of the first work that waits for a context and may run on a worker.

        Empty, and so before all others, where it is only expected; None where there is none.
        """
        groups = self.by_context.get(context, ())
        found = (self._urgency_of(g) for g in groups if not g.allowed or worker in g.allowed)
        return min((priority for priority in found if priority is not None), default=None)

    def groups(self, contexts: Sequence[str]) -> list[Group]:
        """Groups with work ahead that need one of some contexts."""
        found = (group for context in contexts for group in self.by_context.get(context, ()))
        return [group for group in dict.fromkeys(found) if self._urgency_of(group) is not None]

    def _urgency_of(self, group: Group) -> tuple[float, ...] | None:
        work = self.state.peek(group)
        if work is not None:
            return work.priority
        return () if group in self.expected else None


def room(
    state: GateState, view: WorkerView, group: Group, claims: Demand, now: float
) -> list[str] | None:
    """Contexts that would have to leave a worker so that all of a group's fit.

    Returns
    -------
    list or None
        None where they do not fit even so, or others have the better right for now. First in the
        list comes what is least worth keeping.
    """
    missing_bytes = sum(state.sizes.get(context, 0) for context in view.missing(group.contexts))
    lacking = missing_bytes - state.free_bytes(view)
    if lacking <= 0:
        return []
    rivals = [
        context
        for context, tier in view.tiers.items()
        if tier is Tier.DEVICE and context not in group.contexts
    ]
    leaving: list[str] = []
    for context in sorted(rivals, key=lambda c: _worth(state, view, c, claims, now)):
        if lacking <= 0:
            break
        is_promised = view.leaving.get(context, group) != group
        if not is_promised and _may_leave(state, view, context, group, claims, now):
            leaving.append(context)
            lacking -= state.sizes.get(context, 0)
    return leaving if lacking <= 0 else None


def make_room(
    state: GateState, view: WorkerView, group: Group, leaving: Sequence[str]
) -> Iterator[Action]:
    """Have contexts leave, at once where nothing that is there needs them."""
    in_use = view.in_use()
    if not in_use.intersection(leaving):
        yield from (Offload(view.address, context) for context in leaving)
        return
    for context in leaving:
        if context not in view.leaving:
            yield Vacate(view.address, context, group)


def _worth(
    state: GateState, view: WorkerView, context: str, claims: Demand, now: float
) -> tuple[bool, tuple[float, ...], float]:
    """How much it is worth to keep a context: work that waits for it first; then seconds a byte.

    Of those that are waited for, whoever is needed last goes first, as Belady would have it.
    """
    urgency = claims.urgency(context, view.address)
    idle_s = now - view.used_at.get(context, now)
    back_s = max(state.cost.restore_s(context, view.device), 1e-3)
    seconds = back_s * 0.5 ** (idle_s / _HALF_LIFE_S) / max(state.sizes.get(context, 0), 1)
    return urgency is not None, tuple(-number for number in urgency or ()), seconds


def _may_leave(
    state: GateState, view: WorkerView, context: str, group: Group, claims: Demand, now: float
) -> bool:
    """Whether a group has the right to a context's place."""
    rival = claims.urgency(context, view.address)
    if rival is None:
        return True
    work = state.peek(group)
    own = work.priority if work is not None else ()
    if own and rival and own[0] != rival[0]:  # users have said what comes first
        return own[0] < rival[0]
    moving_s = state.cost.restore_s(context, view.device) + sum(
        state.warm_s(view, missing) for missing in view.missing(group.contexts)
    )
    turn_s = now - view.warm_since.get(context, now)
    return turn_s >= max(_MIN_TURN_S, TURNS * moving_s)


def too_large(state: GateState, group: Group, views: Sequence[WorkerView]) -> Iterator[Action]:
    """End work whose contexts no worker's device could hold."""
    limits = [view.device_bytes for view in views]
    known = [limit for limit in limits if limit is not None]
    contexts = dict.fromkeys(group.contexts)
    n_bytes = sum(state.sizes.get(context, 0) for context in contexts)
    if not known or len(known) < len(limits) or n_bytes <= max(known):
        return
    names = " and ".join(repr(state.names.get(context, context)) for context in contexts)
    error = (
        f"{names} {'need' if len(contexts) > 1 else 'needs'} {n_bytes:,} bytes on a device, and the"
        f" largest device has {max(known):,} for contexts ({len(known)} looked at;"
        " pcm.ladder.device.budget). Use a smaller model or data type, or workers with larger"
        " devices."
    )
    yield from (Fail(key, group.contexts[0], error) for key in state.keys(group))


def stay(state: GateState, claims: Demand, now: float) -> None:
    """Contexts that were to make room may stay: for work that is gone, or has no right any more."""
    for view in state.workers.values():
        for group in list(dict.fromkeys(view.leaving.values())):
            is_over = not state.rows_ahead(group) or not view.missing(group.contexts)
            needed = [] if is_over else room(state, view, group, claims, now) or []
            promised = [context for context, whom in view.leaving.items() if whom == group]
            for context in promised:
                if context not in needed:
                    del view.leaving[context]


def cool(state: GateState, now: float, idle_s: float) -> None:
    """Lower contexts that have been warm and unused for `idle_s`.

    What waiting work or a run needs stays, however long it has been idle.
    """
    wanted = {context for group in state.groups() for context in group.contexts}
    for view in state.workers.values():
        wanted_here = view.in_use() | wanted
        for context, tier in list(view.tiers.items()):
            is_idle = now - view.used_at.get(context, now) >= idle_s
            if tier is Tier.DEVICE and is_idle and context not in wanted_here:
                state.decide(Offload(view.address, context), now)
