"""How many workers the work at the gate asks for, and which of those there are it still needs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier


def n_workers_wanted(state: GateState, target_s: float) -> int:
    """Workers that would finish all known work within `target_s`.

    A worker that would not be ready before the work has drained is not asked for: where a load
    takes longer than `target_s`, the load is the target. Before a row's cost is known, each piece
    of work asks for a worker, as it does where workers are warmed.
    """
    working = (group for view in state.workers.values() for group in view.n_works)
    groups = dict.fromkeys([*state.groups(), *working])
    return math.ceil(sum(_share(state, group, target_s) for group in groups))


def needed_workers(state: GateState, workers: Iterable[str]) -> set[str]:
    """Those that are loading, at work, or warm for work that waits or is expected."""
    views = ((worker, state.workers.get(worker)) for worker in workers)
    return {worker for worker, view in views if view is not None and is_needed(state, view)}


def is_needed(state: GateState, view: WorkerView) -> bool:
    """Whether a worker is loading, at work, or warm for work that waits or is expected."""
    if view.running or Tier.LOADING in view.tiers.values():
        return True
    wanted = {context for group in state.groups() for context in group.contexts}
    return any(tier is Tier.DEVICE and context in wanted for context, tier in view.tiers.items())


def _share(state: GateState, group: Group, target_s: float) -> float:
    """Workers that one group asks for."""
    views = state.workers.values()
    n_works = sum(view.n_works.get(group, 0) for view in views)
    queue = state.waiting.queues.get(group)
    n_works += queue.n_works if queue else 0
    runs = [run for run in state.runs.values() if run.group == group]
    row_s = _row_s(state, group)
    if row_s is None:
        return float(max(n_works, sum(run.n_units for run in runs)))
    n_rows = state.rows_ahead(group) + sum(view.n_rows.get(group, 0.0) for view in views)
    warm_s = sum(_warm_s(state, context) for context in group.contexts)
    n_apart = n_works + sum(run.n_rows for run in runs)  # no worker without a piece
    return min(n_apart, n_rows * row_s / max(target_s, warm_s, 1e-9))


def _row_s(state: GateState, group: Group) -> float | None:
    """Mean learned seconds per row, of the workers that are there or else of those that were."""
    views = state.candidates(group)
    known = [state.cost.row_s(group.costs, view.address, view.device) for view in views]
    if not views and group.costs in state.cost.rows:
        known = [rate.value for rate in state.cost.rows[group.costs].rates.values()]
    found = [seconds for seconds in known if seconds is not None]
    return sum(found) / len(found) if found else None


def _warm_s(state: GateState, context: str) -> float:
    """Seconds to warm a worker of no particular device model that has nothing yet."""
    load_s = state.cost.load_s(context, "", state.sizes.get(context, 0))
    return load_s + state.cost.stage_s(context, state.file_bytes.get(context, 0))
