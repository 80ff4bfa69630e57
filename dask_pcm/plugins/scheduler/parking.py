"""How a task waits at the gate, in the scheduler's own terms.

A task is parked by restricting it to a worker that does not exist: the scheduler then keeps it in
its state ``no-worker``, where it can be neither stolen nor scheduled by anybody else. What the user
had restricted it to is kept aside, and holds when it is dispatched.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from distributed import Scheduler
from distributed.scheduler import TaskState

#: The address of no worker.
PARKED = "pcm://parked"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user restricted a task to, before the gate restricted it to nobody."""

    contexts: tuple[str, ...]
    workers: set[str] | None
    hosts: set[str] | None
    is_loose: bool
    annotations: dict[str, Any] | None
    client: str

    @classmethod
    def of(cls, ts: TaskState, contexts: tuple[str, ...], client: str) -> Asked:
        """What is asked of a task that has not been parked before."""
        asked = (ts.worker_restrictions, ts.host_restrictions, ts.loose_restrictions)
        return cls(contexts, *asked, ts.annotations, client)


def park(ts: TaskState) -> None:
    """Have no worker take the task."""
    restrict(ts, {PARKED})


def restrict(ts: TaskState, workers: set[str]) -> None:
    """Have one of `workers` take the task, whatever the user asked."""
    # Host and loose restrictions would let it past the gate.
    ts.worker_restrictions, ts.host_restrictions, ts.loose_restrictions = workers, None, False


def allowed(scheduler: Scheduler, ts: TaskState, asked: Asked) -> frozenset[str] | None:
    """Workers that the user's restrictions and resources leave; None for all."""
    if not (asked.workers or asked.hosts or ts.resource_restrictions):
        return None
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
    """Give a task back to Dask as the user had restricted it."""
    ts.worker_restrictions, ts.host_restrictions = asked.workers, asked.hosts
    ts.loose_restrictions, ts.annotations = asked.is_loose, asked.annotations


def shield_from_timeouts(scheduler: Scheduler, ours: Container[Any]) -> Callable[[], None]:
    """Keep ``no-workers-timeout`` from failing what the gate has parked; return what undoes it.

    Dask's own check still runs, on the tasks that are not `ours`, in their order.
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
