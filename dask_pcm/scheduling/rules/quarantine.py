"""Repeated failed loads quarantine a node or give up a context, whichever they incriminate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dask_pcm.scheduling.actions import Action, Fail, LoadsGivenUp, Quarantine
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.learned.failures import DEVICE, END_OF_PROCESS
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier

#: A context that fails with a different error each time gets this many times as many attempts.
_PATIENCE = 3


def quarantine_nodes(state: GateState, now: float) -> Iterator[Quarantine]:
    """Quarantine nodes on which everything fails, and end the quarantines that are over.

    A failure incriminates the node, not the context, if the device cannot be used or if the same
    context has loaded elsewhere. A node with a warm context is not quarantined: part of it works.
    """
    failures = state.failures
    for address, context in failures.end_back_offs(now):
        worker = state.workers.get(address)
        if worker is not None and worker.tiers.get(context) is Tier.FAILED:
            del worker.tiers[context]
    for host in failures.end_quarantines(now):
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
            yield Quarantine(host, failures.next_quarantine_s(host), failed[-1][2])


def give_up(
    state: GateState, group: Group, workers: Sequence[WorkerView], n_load_attempts: int
) -> Iterator[Action]:
    """Fail a group's work after enough failed loads, unless some worker holds all its contexts.

    Parameters
    ----------
    workers
        Candidates of the group.
    n_load_attempts
        Failed loads, on as many nodes if there are, after which a context is given up.
    """
    if all(device_error(state, view, group) is not None for view in workers):
        yield from _give_up_devices(state, group, workers, n_load_attempts)
        return
    failed = [context for view in workers if (context := view.failed(group.contexts)) is not None]
    if not failed or is_hopeful(workers, group):
        return
    failures = state.failures
    worst = max(failed, key=lambda context: len(failures.of_context.get(context, ())))
    if worst in failures.given_up or _has_failed_enough(state, worst, workers, n_load_attempts):
        yield from (
            Fail(key, worst, failures.errors[worst]) for key in state.ahead.waiting.keys(group)
        )
        yield LoadsGivenUp(worst)


def _give_up_devices(
    state: GateState, group: Group, workers: Sequence[WorkerView], n_load_attempts: int
) -> Iterator[Action]:
    """Fail a group's work if no device can be used and every node has been tried often enough.

    A node counts by its quarantines; a worker on a node excluded quarantine, by its back-offs.
    """
    failures = state.failures
    allowed = state.workers.keys() if group.allowed is None else group.allowed
    there = [view for view in state.workers.values() if view.address in allowed]
    hosts = {view.host for view in there if not view.is_paused}
    excluded = hosts - {view.host for view in workers}
    if not hosts or not excluded <= failures.quarantined.keys() or is_hopeful(workers, group):
        return
    n_tried = [failures.n_quarantines[host] for host in excluded]
    n_tried += [
        failures.n_back_offs[view.address, context]
        for view in workers
        for context in group.contexts
        if (view.address, context) in failures.of_device
    ]
    if min(n_tried) < n_load_attempts:
        return
    said = {failures.quarantined[host].error for host in excluded}
    said |= {error for view in workers if (error := device_error(state, view, group)) is not None}
    context = group.contexts[0]
    errors = "\n".join(sorted(said))
    error = f"No node has a usable device; each was tried {n_load_attempts} times:\n{errors}"
    yield from (Fail(key, context, error) for key in state.ahead.waiting.keys(group))
    yield LoadsGivenUp(context)


def _has_failed_enough(
    state: GateState, context: str, workers: Sequence[WorkerView], n_load_attempts: int
) -> bool:
    """Whether a context failed the same way on `n_load_attempts` nodes, or in any way too often.

    With fewer nodes than that, failures on all of them suffice.
    """
    failures = state.failures.of_context.get(context, [])
    if len(failures) >= _PATIENCE * n_load_attempts:
        return True
    n_nodes = min(n_load_attempts, len({view.host for view in workers}))
    kinds = {kind for _, kind in failures} - {DEVICE}
    if state.estimates.cost.has_loaded(
        context
    ):  # it does not end its process, so something else did
        kinds.discard(END_OF_PROCESS)
    for kind in kinds:
        nodes = [host for host, its_kind in failures if its_kind == kind]
        if len(nodes) >= n_load_attempts and len(set(nodes)) >= n_nodes:
            return True
    return False


def device_error(state: GateState, view: WorkerView, group: Group) -> str | None:
    """The error of a worker whose device could not be used for a group's contexts, or None."""
    of_device = state.failures.of_device
    return next((e for c in group.contexts if (e := of_device.get((view.address, c)))), None)


def n_failures(state: GateState, view: WorkerView, group: Group) -> int:
    """Failed loads of a group's contexts on the node of a worker."""
    of_context = state.failures.of_context
    if not of_context:
        return 0
    return sum(host == view.host for c in group.contexts for host, _ in of_context.get(c, ()))


def is_hopeful(workers: Sequence[WorkerView], group: Group) -> bool:
    """Whether some worker holds all contexts of a group, or is loading them."""
    return any(view.has(group.contexts) for view in workers)
