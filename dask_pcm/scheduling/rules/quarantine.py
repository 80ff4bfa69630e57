"""What repeated failures mean: a context is given up, or a node is left alone for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dask_pcm.scheduling.events import Action, Fail, Group, LoadsGivenUp, Quarantine
from dask_pcm.scheduling.learned.failures import DEVICE, END_OF_PROCESS
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier

#: A context that fails otherwise each time is tried so many times as often.
_PATIENCE = 3


def shun(state: GateState, now: float) -> Iterator[Quarantine]:
    """Leave nodes alone on which everything fails; welcome those that have been for long enough.

    A failure tells of the node, and not of what was loaded, where the device cannot be used, or
    where the same has been loaded elsewhere. What is warm on a node shows that not all of it is
    broken.
    """
    failures = state.failures
    for address, context in failures.rested(now):
        rested = state.workers.get(address)
        if rested is not None and rested.tiers.get(context) is Tier.FAILED:
            del rested.tiers[context]
    for host in failures.welcome(now):
        for view in state.workers.values():
            if view.host == host:
                for context, tier in list(view.tiers.items()):
                    if tier is Tier.FAILED:
                        del view.tiers[context]
    for host, failed in list(failures.of_host.items()):
        here = [view for view in state.workers.values() if view.host == host]
        if any(tier is Tier.DEVICE for view in here for tier in view.tiers.values()):
            del failures.of_host[host]
        else:
            yield Quarantine(host, failures.next_shun_s(host), failed[-1][2])


def give_up(
    state: GateState, group: Group, views: Sequence[WorkerView], n_load_attempts: int
) -> Iterator[Action]:
    """Fail the work whose contexts could not be had together, however often it was tried.

    Parameters
    ----------
    views
        Its candidates.
    """
    if all(device_error(state, view, group) is not None for view in views):
        yield from _give_up_devices(state, group, views, n_load_attempts)
        return
    failed = [context for view in views if (context := view.failed(group.contexts)) is not None]
    if not failed or is_hopeful(views, group):
        return
    failures = state.failures
    worst = max(failed, key=lambda context: len(failures.of_context.get(context, ())))
    if worst in failures.given_up or _has_failed_enough(state, worst, views, n_load_attempts):
        yield from (Fail(key, worst, failures.errors[worst]) for key in state.keys(group))
        yield LoadsGivenUp(worst)


def _give_up_devices(
    state: GateState, group: Group, views: Sequence[WorkerView], n_load_attempts: int
) -> Iterator[Action]:
    """No device can be used, and each node, or worker of one that is not left alone, was tried."""
    failures = state.failures
    allowed = state.workers.keys() if group.allowed is None else group.allowed
    there = [view for view in state.workers.values() if view.address in allowed]
    hosts = {view.host for view in there if not view.is_paused}
    alone = hosts - {view.host for view in views}
    if not hosts or not alone <= failures.shunned.keys() or is_hopeful(views, group):
        return
    n_tried = [failures.n_shunned[host] for host in alone]
    n_tried += [
        failures.n_rested[view.address, context]
        for view in views
        for context in group.contexts
        if (view.address, context) in failures.of_device
    ]
    if min(n_tried) < n_load_attempts:
        return
    said = {failures.shunned[host].error for host in alone}
    said |= {error for view in views if (error := device_error(state, view, group)) is not None}
    context = group.contexts[0]
    errors = "\n".join(sorted(said))
    error = f"No node can be used, and all have been tried {n_load_attempts} times:\n{errors}"
    yield from (Fail(key, context, error) for key in state.keys(group))
    yield LoadsGivenUp(context)


def _has_failed_enough(
    state: GateState, context: str, views: Sequence[WorkerView], n_load_attempts: int
) -> bool:
    """Whether it failed the same way on so many nodes, as far as there are; or all too often."""
    failures = state.failures.of_context.get(context, [])
    if len(failures) >= _PATIENCE * n_load_attempts:
        return True
    n_nodes = min(n_load_attempts, len({view.host for view in views}))
    kinds = {kind for _, kind in failures} - {DEVICE}
    if state.cost.has_loaded(context):  # whoever ends the process is another
        kinds.discard(END_OF_PROCESS)
    for kind in kinds:
        nodes = [host for host, its_kind in failures if its_kind == kind]
        if len(nodes) >= n_load_attempts and len(set(nodes)) >= n_nodes:
            return True
    return False


def device_error(state: GateState, view: WorkerView, group: Group) -> str | None:
    """What a worker said when its device could not be used for what a group needs."""
    of_device = state.failures.of_device
    return next((e for c in group.contexts if (e := of_device.get((view.address, c)))), None)


def n_failures(state: GateState, view: WorkerView, group: Group) -> int:
    """How often what a group needs has failed on the node of a worker."""
    of_context = state.failures.of_context
    if not of_context:
        return 0
    return sum(host == view.host for c in group.contexts for host, _ in of_context.get(c, ()))


def is_hopeful(views: Sequence[WorkerView], group: Group) -> bool:
    """Whether some worker holds all contexts of a group, or is about to."""
    return any(view.has(group.contexts) for view in views)
