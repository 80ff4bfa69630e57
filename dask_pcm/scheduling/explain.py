"""``explain``: why work waits, or where it was assigned and why."""

from __future__ import annotations

import math
from collections import Counter

from dask_pcm.scheduling.actions import (
    Assign,
    Fail,
    Load,
    Quarantine,
    Vacate,
)
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.rules.device_fit import fits, needed_bytes
from dask_pcm.scheduling.rules.drain_time import capacities, drain_s
from dask_pcm.scheduling.state.decisions import Decision
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.scheduling.state.worker import WorkerView, remaining_s
from dask_pcm.tiers import Tier

_MAX_LINES = 12


def explain(state: GateState, key: object, now: float) -> str:
    """Describe the state of a piece of work and the recent decisions on it.

    Parameters
    ----------
    key
        Key of work that waits, is assigned, or was decided on recently.
    now
        Seconds of the policy's clock.

    Returns
    -------
    str
        One or more lines.
    """
    lines = [*_present(state, key, now), *_past(state, key, now)]
    if not lines:
        return f"{key!r} is not at the gate, and there is no recent decision on it."
    return "\n".join(lines)


def _present(state: GateState, key: object, now: float) -> list[str]:
    """Where the work is now; for waiting work, a reason for each worker that does not run it."""
    if key in state.placed:
        return [_placed(state, key, state.placed[key], now)]
    work = state.ahead.waiting.works.get(key)
    if work is None:
        return []
    keys = state.ahead.waiting.keys(work.group)
    n_before = keys.index(key)
    order = (
        f"behind {n_before:,} of {len(keys) - 1:,} others of its group"
        if len(keys) > 1
        else "the only one of its group"
    )
    lines = [f"{key!r} waits ({order}) for {_names(state, work.group)}."]
    if work.group.is_isolated:
        lines.append(
            "It is isolated, because it was running when a worker process died: it waits for a"
            " worker without other work."
        )
    reasons = Counter(_reason(state, work.group, view, now) for view in state.workers.values())
    if not reasons:
        lines.append("There are no workers.")
    for reason, n_workers in reasons.most_common(_MAX_LINES):
        lines.append(f"  {n_workers} worker{'s' if n_workers > 1 else ''}: {reason}")
    return lines


def _placed(state: GateState, key: object, worker: str, now: float) -> str:
    view = state.workers[worker]
    backlog_s = state.estimates.backlog_s(view, now)
    if key in view.waiting:
        return f"{key!r} is assigned to {worker}; it has seceded, and waits for other work."
    others = len(view.running) - 1
    return (
        f"{key!r} is assigned to {worker}, with {others} other{'' if others == 1 else 's'};"
        f" expected to finish within {_seconds(backlog_s)}."
    )


def _reason(state: GateState, group: Group, view: WorkerView, now: float) -> str:
    """Why a worker does not run work of a group; the checks follow the order of the policy's."""
    quarantine = state.failures.quarantined.get(view.host)
    if group.allowed is not None and view.address not in group.allowed:
        return "excluded by the task's worker restrictions"
    if quarantine is not None:
        left_s = quarantine.until - now
        error = quarantine.error.strip().splitlines()[-1:] or [""]
        return f"its node is quarantined for {_seconds(left_s)} more; last error: {error[0]}"
    if view.is_paused:
        return "paused by Dask, or closing"
    failed = view.failed(group.contexts)
    if failed is not None:
        error = state.failures.errors.get(failed, "").strip().splitlines()[-1:] or [""]
        return f"failed to load {_name(state, failed)}: {error[0]}"
    if view.missing(group.contexts):
        return _why_cold(state, group, view, now)
    loading = [c for c in group.contexts if view.tiers.get(c) is Tier.LOADING]
    if loading:
        remaining = (
            remaining_s(view.loading_s[c], now - view.loading_since[c])
            for c in loading
            if c in view.loading_since
        )
        return f"loading, ready in about {_seconds(max(remaining, default=0.0))}"
    if view.reserved_for is not None and view.reserved_for != group:
        return "reserved for isolated work"
    if not view.serves(group.contexts):
        return "its context is about to be evicted there"
    if view.has_isolated_work:
        return "runs isolated work"
    if view.ends_at < math.inf and not math.isfinite(_finish_s(state, group, view, now)):
        return f"ends in {_seconds(view.ends_at - now)}, before the work could finish"
    if view.n_on_lanes >= view.n_lanes:
        return f"warm, busy for about {_seconds(state.estimates.backlog_s(view, now))}"
    return (
        f"warm, but would finish in {_seconds(_finish_s(state, group, view, now))}: other workers"
        " are expected to finish it sooner"
    )


def _why_cold(state: GateState, group: Group, view: WorkerView, now: float) -> str:
    """Why a cold worker is not being warmed for a group."""
    missing = view.missing(group.contexts)
    n_bytes = sum(state.contexts.size(context) for context in missing)
    free = view.free_bytes
    if not fits(state, view, group):
        return (
            f"{_names(state, group)} needs {needed_bytes(state, group.contexts):,} bytes on a"
            f" device, and its has {view.device_bytes:,} for contexts"
        )
    if n_bytes > free:
        return (
            f"cold: {_names(state, group)} needs {n_bytes:,} bytes of its device, {free:,.0f} are"
            " free, and the contexts on it are in use or their turn is not over"
        )
    ready_s = state.estimates.backlog_s(view, now) + sum(
        state.estimates.warm_s(view, context) for context in missing
    )
    if view.is_draining or now + ready_s > view.ends_at:
        return f"cold, and ends in {_seconds(view.ends_at - now)}"
    serving = capacities(state, group, state.candidates(group), now)
    drained_s = drain_s(state.ahead.n_rows(group), serving)
    if ready_s >= drained_s:
        return (
            f"cold: it would be warm in {_seconds(ready_s)}, after the other workers have finished"
            f" ({_seconds(drained_s)})"
        )
    return f"cold, and could be warm in {_seconds(ready_s)}"


def _finish_s(state: GateState, group: Group, view: WorkerView, now: float) -> float:
    """Expected seconds until a worker would have finished the group's next work."""
    work = state.ahead.peek(group, view.device)
    seconds = (state.estimates.row_s(group, view, now) or 0.0) * (work.n_rows if work else 1.0)
    backlog_s = state.estimates.backlog_s(view, now)
    return backlog_s + state.estimates.lasting_s(view, seconds, now + backlog_s)


def _past(state: GateState, key: object, now: float) -> list[str]:
    """Decisions on a piece of work, the last first."""
    own = [d for d in state.plans.decisions if getattr(d.action, "key", None) == key]
    return [_line(state, decision, now) for decision in reversed(own[-_MAX_LINES:])]


def decisions(state: GateState, now: float, n: int = 20) -> str:
    """Describe the last `n` decisions, the last first, one per line."""
    return "\n".join(
        _line(state, decision, now) for decision in list(state.plans.decisions)[: -n - 1 : -1]
    )


def _line(state: GateState, decision: Decision, now: float) -> str:
    return f"{_seconds(now - decision.at)} ago: {describe(state, decision)}"


def describe(state: GateState, decision: Decision) -> str:
    """Describe a decision, with the estimates that it was based on."""
    match decision.action:
        case Assign(key, worker):
            if len(decision.numbers) < 2:
                return f"{key!r} to {worker}, warm or not: the policy had stalled."
            finish_s, n_rows = decision.numbers
            return (
                f"{key!r} ({n_rows:,.0f} rows) to {worker}: warm, with room, expected to finish in"
                f" {_seconds(finish_s)}."
            )
        case Load(worker, context) if not decision.numbers:
            return f"Load {_name(state, context)} on {worker}: the policy had stalled."
        case Load(worker, context):
            ready_s, drained_s = decision.numbers
            return (
                f"Load {_name(state, context)} on {worker}: ready in {_seconds(ready_s)}; without"
                f" it, the work would take {_seconds(drained_s)}."
            )
        case Vacate(worker, context, group):
            return (
                f"Evict {_name(state, context)} from {worker} for {_names(state, group)}, once the"
                " work that needs it there has ended."
            )
        case Fail(key, _, error):
            return f"{key!r} failed: {error}"
        case Quarantine(host, seconds, error):
            return f"Node {host} quarantined for {_seconds(seconds)}: {error}"
        case other:
            return str(other)


def _names(state: GateState, group: Group) -> str:
    return " and ".join(_name(state, context) for context in group.contexts)


def _name(state: GateState, context: str) -> str:
    return f"context {state.contexts.names.get(context, context)!r}"


def _seconds(seconds: float) -> str:
    if math.isinf(seconds):
        return "an unknown time"
    return f"{seconds:.3g} s"
