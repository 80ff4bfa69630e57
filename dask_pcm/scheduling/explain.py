"""Why work waits, or where it went and why."""

from __future__ import annotations

import math
from collections import Counter

from dask_pcm.scheduling.events import Assign, Fail, Group, Load, Quarantine, Vacate
from dask_pcm.scheduling.rules.drain_time import drain_s, offers
from dask_pcm.scheduling.state.state import Decision, GateState
from dask_pcm.scheduling.state.worker import WorkerView, still_s
from dask_pcm.tiers import Tier

_MAX_LINES = 12


def explain(state: GateState, key: object, now: float) -> str:
    """What the gate knows of a piece of work, in words.

    Parameters
    ----------
    key
        Of work that waits, is on a worker, or was decided on lately.
    """
    lines = [*_present(state, key, now), *_past(state, key, now)]
    if not lines:
        return f"{key!r} is not at the gate, and nothing was decided on it lately."
    return "\n".join(lines)


def _present(state: GateState, key: object, now: float) -> list[str]:
    if key in state.placed:
        return [_placed(state, key, state.placed[key], now)]
    work = state.waiting.works.get(key)
    if work is None:
        return []
    keys = state.keys(work.group)
    n_before = keys.index(key)
    order = (
        f"{n_before:,} of {len(keys) - 1:,} like it go first" if len(keys) > 1 else "the only one"
    )
    lines = [f"{key!r} waits ({order}) for {_names(state, work.group)}."]
    if work.group.is_isolated:
        lines.append(
            "It was there when a worker process ended by itself, and runs alone: it waits for a"
            " worker to be empty."
        )
    reasons = Counter(_reason(state, work.group, view, now) for view in state.workers.values())
    if not reasons:
        lines.append("There are no workers.")
    for reason, n_workers in reasons.most_common(_MAX_LINES):
        lines.append(f"  {n_workers} worker{'s' if n_workers > 1 else ''}: {reason}")
    return lines


def _placed(state: GateState, key: object, worker: str, now: float) -> str:
    view = state.workers[worker]
    backlog_s = state.backlog_s(view, now)
    others = len(view.running) - 1
    return (
        f"{key!r} is on {worker}, with {others} other{'' if others == 1 else 's'}; all are expected"
        f" to be done in {_seconds(backlog_s)}."
    )


def _reason(state: GateState, group: Group, view: WorkerView, now: float) -> str:
    """Why a worker does not have it."""
    shunned = state.failures.shunned.get(view.host)
    if group.allowed is not None and view.address not in group.allowed:
        return "not among those that it may run on"
    if shunned is not None:
        rest = shunned.until - now
        error = shunned.error.strip().splitlines()[-1:] or [""]
        return f"its node is left alone for {_seconds(rest)} more; the last error: {error[0]}"
    if view.is_paused:
        return "paused by Dask, or about to leave"
    failed = view.failed(group.contexts)
    if failed is not None:
        error = state.failures.errors.get(failed, "").strip().splitlines()[-1:] or [""]
        return f"{_name(state, failed)} could not be loaded there: {error[0]}"
    if view.missing(group.contexts):
        return _why_cold(state, group, view, now)
    loading = [c for c in group.contexts if view.tiers.get(c) is Tier.LOADING]
    if loading:
        still = (
            still_s(view.loading_s[c], now - view.loading_since[c])
            for c in loading
            if c in view.loading_since
        )
        return f"loading, for about {_seconds(max(still, default=0.0))} more"
    if view.reserved_for is not None and view.reserved_for != group:
        return "kept for work that runs alone"
    if not view.serves(group.contexts):
        return "its context makes room for others there"
    if view.is_taken:
        return "taken by work that runs alone"
    if view.ends_at < math.inf and not math.isfinite(_finish_s(state, group, view, now)):
        return f"ends in {_seconds(view.ends_at - now)}, before it could be done"
    if len(view.running) >= view.n_lanes:
        return f"warm, and has work for about {_seconds(state.backlog_s(view, now))}"
    return (
        f"warm, and would take {_seconds(_finish_s(state, group, view, now))}: others are expected"
        " to be done with it before"
    )


def _why_cold(state: GateState, group: Group, view: WorkerView, now: float) -> str:
    missing = view.missing(group.contexts)
    n_bytes = sum(state.sizes.get(context, 0) for context in missing)
    free = state.free_bytes(view)
    if n_bytes > free:
        return (
            f"cold: {_names(state, group)} would need {n_bytes:,} bytes of its device, {free:,.0f}"
            " are free, and what is there has work or its turn"
        )
    ready_s = state.backlog_s(view, now) + sum(state.warm_s(view, context) for context in missing)
    if view.is_draining or now + ready_s > view.ends_at:
        return f"cold, and ends in {_seconds(view.ends_at - now)}"
    made = offers(state, group, state.candidates(group), now)
    drained_s = drain_s(state.rows_ahead(group), made)
    if ready_s >= drained_s:
        return (
            f"cold: it would be warm in {_seconds(ready_s)}, when the others are done"
            f" ({_seconds(drained_s)})"
        )
    return f"cold, and could be warm in {_seconds(ready_s)}"


def _finish_s(state: GateState, group: Group, view: WorkerView, now: float) -> float:
    work = state.peek(group, view.device)
    seconds = (state.row_s(group, view, now) or 0.0) * (work.n_rows if work else 1.0)
    backlog_s = state.backlog_s(view, now)
    return backlog_s + state.lasting_s(view, seconds, now + backlog_s)


def _past(state: GateState, key: object, now: float) -> list[str]:
    """What was decided on it, the last first."""
    own = [d for d in state.decisions if getattr(d.action, "key", None) == key]
    return [_line(state, decision, now) for decision in reversed(own[-_MAX_LINES:])]


def decisions(state: GateState, now: float, n: int = 20) -> str:
    """The last decisions, the last first."""
    return "\n".join(
        _line(state, decision, now) for decision in list(state.decisions)[: -n - 1 : -1]
    )


def _line(state: GateState, decision: Decision, now: float) -> str:
    return f"{_seconds(now - decision.at)} ago: {said(state, decision)}"


def said(state: GateState, decision: Decision) -> str:
    """A decision in words, with the numbers that it was made by."""
    match decision.action:
        case Assign(key, worker):
            if len(decision.numbers) < 2:
                return f"{key!r} to {worker}, where it may have to load: the policy had stalled."
            finish_s, n_rows = decision.numbers
            return (
                f"{key!r} ({n_rows:,.0f} rows) to {worker}, which was warm, had room, and would be"
                f" done in {_seconds(finish_s)}."
            )
        case Load(worker, context) if not decision.numbers:
            return f"{_name(state, context)} to be loaded by {worker}: the policy had stalled."
        case Load(worker, context):
            ready_s, drained_s = decision.numbers
            return (
                f"{_name(state, context)} to be loaded by {worker}, ready in {_seconds(ready_s)};"
                f" without it, all would be done in {_seconds(drained_s)}."
            )
        case Vacate(worker, context, group):
            return (
                f"{_name(state, context)} to leave {worker} for {_names(state, group)}, as soon as"
                " what needs it there has ended."
            )
        case Fail(key, _, error):
            return f"{key!r} failed: {error}"
        case Quarantine(host, seconds, error):
            return f"Node {host} left alone for {_seconds(seconds)}: {error}"
        case other:
            return str(other)


def _names(state: GateState, group: Group) -> str:
    return " and ".join(_name(state, context) for context in group.contexts)


def _name(state: GateState, context: str) -> str:
    return f"context {state.names.get(context, context)!r}"


def _seconds(seconds: float) -> str:
    if math.isinf(seconds):
        return "an unknown time"
    return f"{seconds:.3g} s"
