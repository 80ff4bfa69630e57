"""Which devices are large enough for contexts; work that fits on none fails, with the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dask_pcm.scheduling.actions import Fail
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView


def needed_bytes(state: GateState, contexts: Iterable[str]) -> int:
    """Bytes that contexts take on a device together, as far as their sizes are known."""
    return sum(state.contexts.size(context) for context in dict.fromkeys(contexts))


def fits(state: GateState, view: WorkerView, group: Group) -> bool:
    """Whether a group's contexts fit a worker's device, were it empty; true if not known."""
    return view.device_bytes is None or needed_bytes(state, group.contexts) <= view.device_bytes


def fits_pool(state: GateState, pool: str, group: Group) -> bool:
    """Whether a group's contexts fit the device of a pool's workers; true if not known."""
    limit = state.pools.get(pool)
    return limit is None or needed_bytes(state, group.contexts) <= limit


def fail_too_large(state: GateState, group: Group, workers: Sequence[WorkerView]) -> Iterator[Fail]:
    """Fail work whose contexts fit on no device of a worker, or of a pool that may give workers."""
    contexts = list(dict.fromkeys(group.contexts))
    names = [state.contexts.names.get(context, context) for context in contexts]
    n_bytes = needed_bytes(state, contexts)
    # Work that is restricted to workers by address runs on no others.
    error = why_too_large(state, names, n_bytes, workers, has_pools=group.allowed is None)
    if error:
        yield from (Fail(key, contexts[0], error) for key in state.ahead.waiting.keys(group))


def why_too_large(
    state: GateState,
    names: Sequence[str],
    n_bytes: int,
    workers: Iterable[WorkerView],
    has_pools: bool = True,
) -> str:
    """Why contexts that take `n_bytes` together fit nowhere, in words; "" if they may fit.

    Parameters
    ----------
    names
        The contexts, for the message.
    workers
        Those that may run the work. One that has reported no limit may be large enough.
    has_pools
        Whether workers of the cluster's pools that are yet to come may run it, too.
    """
    pools = state.pools if has_pools else {}
    limits: dict[str, list[int | None]] = {pool: [] for pool in pools}
    for view in workers:
        limits.setdefault(view.pool if view.pool in pools else "", []).append(view.device_bytes)
    for pool, declared in pools.items():
        # Workers of a pool are of one kind: what those that are there say counts for all.
        if declared is not None or not limits[pool]:
            limits[pool].append(declared)
    known = [limit for found in limits.values() for limit in found if limit is not None]
    n_limits = sum(map(len, limits.values()))
    if not known or len(known) < n_limits or n_bytes <= max(known):
        return ""
    what = f"{' and '.join(map(repr, names))} {'need' if len(names) > 1 else 'needs'} {n_bytes:,}"
    if not pools:
        return (
            f"{what} bytes on a device, and the largest device has {max(known):,} for contexts"
            f" ({len(known)} workers checked; pcm.ladder.device.budget). Use a smaller model or"
            " data type, or workers with larger devices."
        )
    largest = {pool: max(n for n in found if n is not None) for pool, found in limits.items()}
    told = [f"{f'pool {pool!r}' if pool else 'other workers'} {n:,}" for pool, n in largest.items()]
    return (
        f"{what} bytes on the devices of a worker, which have for contexts: {', '.join(told)}. Use"
        " a smaller model or data type, a pool with larger devices, or a larger gpus_per_worker if"
        " the loader divides it among devices."
    )
