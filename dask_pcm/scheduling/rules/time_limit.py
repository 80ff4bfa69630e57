"""A load that takes longer than its workers live is given up: new jobs would begin it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dask_pcm.scheduling.actions import Action, Fail, LoadsGivenUp
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView


def fail_too_slow(
    state: GateState, group: Group, workers: Sequence[WorkerView], n_load_attempts: int
) -> Iterator[Action]:
    """Fail a group's work if loads of one of its contexts have outlasted enough workers.

    Not while a worker holds the context or lives longer than those, nor if another pool may have
    such workers.

    Parameters
    ----------
    workers
        Candidates of the group.
    n_load_attempts
        Workers that must have reached the limit of their time while they loaded.
    """
    for context in group.contexts:
        outlasted = state.failures.outlasted.get(context, [])
        if len(outlasted) < n_load_attempts:
            continue
        longest_s = max(one.limit_s for one in outlasted)
        is_hopeful = any(v.holds((context,)) or v.limit_s > longest_s for v in workers)
        if is_hopeful or not state.pools.keys() <= {one.pool for one in outlasted}:
            continue
        error = (
            f"Context {state.contexts.names.get(context, context)!r} takes longer to load than its"
            f" workers live: {len(outlasted)} of them, whose time limit was {longest_s:.0f} s or"
            f" less, loaded for {max(one.loaded_s for one in outlasted):.0f} s and ended. Give jobs"
            " a longer walltime."
        )
        yield from (Fail(key, context, error) for key in state.ahead.waiting.keys(group))
        yield LoadsGivenUp(context)
