"""A task is parked by restricting it to a worker that does not exist.

The scheduler then keeps it in the state ``no-worker``, where it is neither stolen nor scheduled.
The user's own restrictions are saved; the policy respects them, and ``unpark`` restores them.

Everything here runs on the scheduler's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from distributed import Scheduler
from distributed.scheduler import TaskState

#: The address of a worker that does not exist.
PARKED = "pcm://parked"


@dataclass(frozen=True, slots=True)
class Asked:
    """A task's restrictions, annotations and client as the user set them, before it is parked."""

    contexts: tuple[str, ...]
    workers: set[str] | None
    hosts: set[str] | None
    is_loose: bool
    annotations: dict[str, Any] | None
    client: str

    @classmethod
    def of(cls, ts: TaskState, contexts: tuple[str, ...], client: str) -> Asked:
        """Save what the user set for a task that has not been parked before."""
        asked = (ts.worker_restrictions, ts.host_restrictions, ts.loose_restrictions)
        return cls(contexts, *asked, ts.annotations, client)


def park(ts: TaskState) -> None:
    """Keep every worker from taking the task."""
    restrict(ts, {PARKED})


def restrict(ts: TaskState, workers: set[str]) -> None:
    """Restrict the task to `workers`, in place of the user's own restrictions."""
    # Host and loose restrictions would let the scheduler choose another worker.
    ts.worker_restrictions, ts.host_restrictions, ts.loose_restrictions = workers, None, False


def allowed(scheduler: Scheduler, ts: TaskState, asked: Asked) -> frozenset[str] | None:
    """The workers that satisfy the user's restrictions and resources; None if any worker does."""
    if not (asked.workers or asked.hosts or ts.resource_restrictions):
        return None
    # Dask's own rule, asked with the user's restrictions put back for the duration of the call.
    mine = (ts.worker_restrictions, ts.host_restrictions)
    ts.worker_restrictions, ts.host_restrictions = asked.workers, asked.hosts
    try:
        valid = scheduler.valid_workers(ts)
    finally:
        ts.worker_restrictions, ts.host_restrictions = mine
    if valid is None or (not valid and asked.is_loose):
        return None
    return frozenset(ws.address for ws in valid)


def unpark(ts: TaskState, asked: Asked) -> None:
    """Give a task back to Dask with the user's own restrictions."""
    ts.worker_restrictions, ts.host_restrictions = asked.workers, asked.hosts
    ts.loose_restrictions, ts.annotations = asked.is_loose, asked.annotations


def shield_from_timeouts(scheduler: Scheduler, ours: Container[Any]) -> Callable[[], None]:
    """Exempt parked tasks from ``no-workers-timeout``; return a function that undoes it.

    Dask's own check still runs for the tasks that are not `ours`, in their order.
    """
    callback = scheduler.periodic_callbacks.get("no-workers-timeout")
    if callback is None:
        return lambda: None
    check = scheduler._check_no_workers

    def shielded() -> None:
        everything = scheduler.unrunnable
        others = {ts: since for ts, since in everything.items() if ts.key not in ours}
        scheduler.unrunnable = others
        try:
            check()
        finally:
            scheduler.unrunnable = {
                ts: since for ts, since in everything.items() if ts.key in ours or ts in others
            }

    def unshield() -> None:
        callback.callback = check

    callback.callback = shielded
    return unshield
