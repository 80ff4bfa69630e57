"""What a run asks of its cluster, with a bound on every wait.

A scheduler may be frozen, a network cut, a worker lost with its results: the thread that drives the
run still gets back to Ctrl-C and ``Run.cancel``.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, wait
from concurrent.futures import Future as Answer
from dataclasses import dataclass, fields, replace
from typing import Any

from distributed import Client, Future, LocalCluster

from dask_pcm.context.context import ContextRef
from dask_pcm.errors import DeviceMemoryError
from dask_pcm.scheduling.feed.feed import DeviceDemand

#: How long a call waits for the scheduler's answer; an answer that comes later is taken in then.
_ANSWER_S, _CLOSE_S = 2.0, 1.0
#: The user is told of what the run has lacked for this long.
_LACK_S = 10.0


@dataclass(frozen=True, slots=True)
class GateStatus:
    """The gate's report of a run's contexts and workers.

    Attributes
    ----------
    n_workers, n_on_cluster, n_warm
        Workers with the toolkit, all workers, and workers that hold the run's contexts.
    n_loads, load_s
        Times that these contexts were built since they were declared, and the seconds that took.
    demand
        Workers by device model, with their speeds.
    """

    n_workers: int = 0
    n_on_cluster: int = 0
    n_warm: int = 0
    n_loads: int = 0
    load_s: float = 0.0
    demand: tuple[DeviceDemand, ...] = ()


class GateLink:
    """A run's way to the gate, for the thread that drives it.

    Parameters
    ----------
    kind
        What the keys of its units have in common: the gate learns costs by it.
    """

    def __init__(self, client: Client, run: str, refs: Sequence[ContextRef], kind: str) -> None:
        self._client = client
        self._fixed = {"run": run, "client": client.id, "refs": pickle.dumps(refs), "kind": kind}
        self._has_contexts = bool(refs)
        self._asked: Answer[Any] | None = None
        self._n_most = 0
        #: When the gate last answered, and when it last had workers.
        self._answered_at = self._had_workers_at = time.monotonic()
        self._n_other = 0

    def report(self, n_rows: float, n_units: int) -> GateStatus | None:
        """Report what the run will still submit; return the gate's state of its contexts.

        None where the scheduler has not answered in time, is gone or has no gate. Nothing more is
        sent until it has answered.
        """
        # One report at a time: a slow scheduler must not get a queue of stale ones.
        if self._asked is None:
            self._asked = self._tell(n_rows, n_units)
            _wait(self._asked, _ANSWER_S)
        if self._asked is None or not self._asked.done():
            return None
        asked, self._asked = self._asked, None
        answer = _result(asked)
        self._answered_at = time.monotonic()
        if not isinstance(answer, dict):
            return None
        # Only fields that both know: the scheduler's gate may be of another version.
        names = [field.name for field in fields(GateStatus) if field.name in answer]
        gate = GateStatus(**{name: answer[name] for name in names})
        gate = replace(gate, demand=tuple(DeviceDemand(*one) for one in gate.demand))
        self._n_most = max(self._n_most, gate.n_workers)
        self._n_other = gate.n_on_cluster - gate.n_workers
        if gate.n_workers:
            self._had_workers_at = time.monotonic()
        return gate

    def refuse_too_large(self) -> None:
        """Raise if no worker, and no pool of the cluster, has devices that the contexts fit.

        Raises
        ------
        DeviceMemoryError
            With what they take and what each pool's workers have.
        """
        scheduler = self._client.scheduler
        if scheduler is None or not self._has_contexts:
            return
        asked = self._ask(scheduler.pcm_too_large(refs=self._fixed["refs"]))
        _wait(asked, _ANSWER_S)
        why = _result(asked) if asked.done() else asked.cancel()
        if isinstance(why, str) and why:
            raise DeviceMemoryError(why)

    def close(self) -> None:
        """Close the run at the gate, which then keeps no workers for it."""
        _wait(self._tell(0.0, 0), _CLOSE_S)

    def gather(self, futures: Sequence[Future]) -> Answer[list[Any]]:
        """The results of futures, from their workers; returns at once."""
        return self._ask(self._client.gather(list(futures), asynchronous=True))

    def processing(self) -> set[Any] | None:
        """Keys of all tasks that workers have; None if the scheduler does not answer in time."""
        asked = self._ask(self._client.scheduler.processing(workers=None))
        _wait(asked, _ANSWER_S)
        found = _result(asked) if asked.done() else asked.cancel()
        if not isinstance(found, dict):
            return None
        return {key for keys in found.values() for key in keys}

    @property
    def lack(self) -> str:
        """What the run has waited for and cannot go on without, in words; "" if nothing."""
        now = time.monotonic()
        silent_s = now - self._answered_at
        if self._asked is not None and silent_s > _LACK_S:
            return f"no answer from the scheduler for {silent_s:.0f} s"
        if now - self._had_workers_at <= _LACK_S:
            return ""
        return lack_of_workers(self._client, self._n_other, self._n_most)

    def begin_waiting(self) -> None:
        """Measure from now on how long something is lacking."""
        self._answered_at = self._had_workers_at = time.monotonic()

    def _tell(self, n_rows: float, n_units: int) -> Answer[Any] | None:
        scheduler = self._client.scheduler
        if scheduler is None:  # the client is closed, and its futures say so
            return None
        return self._ask(scheduler.pcm_run(**self._fixed, n_rows=n_rows, n_units=n_units))

    def _ask(self, coroutine: Coroutine[Any, Any, Any]) -> Answer[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._client.loop.asyncio_loop)


def lack_of_workers(client: Client, n_other: int, n_most: int) -> str:
    """What a cluster without workers lacks, in words.

    Parameters
    ----------
    n_other
        Its workers without the toolkit.
    n_most
        The most workers that it had: wanted where the cluster has no plan of its own.
    """
    if n_other:
        return f"no workers: the cluster has {n_other}, none of them with dask_pcm"
    if lack := getattr(client.cluster, "lack", ""):
        return str(lack)
    n_wanted = len(getattr(client.cluster, "plan", ())) or n_most
    text = "no workers: the cluster has 0" + (f" ({n_wanted} wanted)" if n_wanted else "")
    # Such as after Ctrl-C in a terminal, which also interrupts workers without the toolkit.
    is_local = n_wanted and isinstance(client.cluster, LocalCluster)
    return text + (f"; cluster.scale({n_wanted}) starts new ones" if is_local else "")


def _wait(answer: Answer[Any] | None, seconds: float) -> None:
    if answer is not None:
        wait([answer], seconds)


def _result(answer: Answer[Any]) -> Any:
    """The answer; None where the scheduler has no gate, or is gone: then futures raise."""
    try:
        return answer.result(0)
    except (OSError, AttributeError, CancelledError):
        return None
