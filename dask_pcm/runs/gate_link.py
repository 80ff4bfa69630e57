"""What a run asks of its cluster.

No call here waits for longer than it says, whatever the cluster does: a scheduler may be frozen, a
network cut, a worker lost with its results. So who drives a run can always heed its user.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, wait
from concurrent.futures import Future as Answer
from typing import Any

from distributed import Client, Future

from dask_pcm.context.context import ContextRef

#: How long an answer of the scheduler is waited for; it is taken in later if it comes then.
_ANSWER_S, _CLOSE_S = 2.0, 1.0
#: What is lacking for so long, the user is told.
_LACK_S = 10.0


class Link:
    """A run's way to the scheduler, for the thread that drives it.

    Parameters
    ----------
    kind
        What the keys of its units have in common, as the gate sees it.
    """

    def __init__(self, client: Client, run: str, refs: Sequence[ContextRef], kind: str) -> None:
        self._client = client
        self._says = {"run": run, "client": client.id, "refs": pickle.dumps(refs), "kind": kind}
        self._asked: Answer[Any] | None = None
        self._n_most = 0
        #: When the gate last answered, and when it last had workers.
        self._answered_at = self._had_workers_at = time.monotonic()
        self._n_other = 0

    def report(self, n_rows: float, n_units: int) -> dict[str, Any] | None:
        """Tell the gate what is still to come, and learn how the contexts stand.

        None where it has not answered in time, has left, or was never there. Until it has, nothing
        more is told.
        """
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
        n_workers = answer["n_workers"]
        self._n_most = max(self._n_most, n_workers)
        self._n_other = answer.get("n_on_cluster", n_workers) - n_workers
        if n_workers:
            self._had_workers_at = time.monotonic()
        return answer

    def close(self) -> None:
        """Nothing more will come: the gate need not keep workers for it."""
        _wait(self._tell(0.0, 0), _CLOSE_S)

    def gather(self, futures: Sequence[Future]) -> Answer[list[Any]]:
        """Their results, once they are here."""
        return self._ask(self._client.gather(list(futures), asynchronous=True))

    def processing(self) -> set[Any] | None:
        """Keys of all tasks that workers have; None where the scheduler does not answer."""
        asked = self._ask(self._client.scheduler.processing(workers=None))
        _wait(asked, _ANSWER_S)
        found = _result(asked) if asked.done() else asked.cancel()
        if not isinstance(found, dict):
            return None
        return {key for keys in found.values() for key in keys}

    @property
    def lack(self) -> str:
        """What the run cannot go on without, in words; empty while there is nothing of the kind."""
        now = time.monotonic()
        silent_s = now - self._answered_at
        if self._asked is not None and silent_s > _LACK_S:
            return f"no answer from the scheduler for {silent_s:.0f} s"
        if now - self._had_workers_at <= _LACK_S:
            return ""
        if self._n_other:
            return f"no workers: the cluster has {self._n_other}, none of them with dask_pcm"
        n_wanted = self._n_wanted()
        return "no workers: the cluster has 0" + (f" ({n_wanted} wanted)" if n_wanted else "")

    def begin_waiting(self) -> None:
        """What is lacking counts from now on."""
        self._answered_at = self._had_workers_at = time.monotonic()

    def _n_wanted(self) -> int:
        """Workers that the cluster is to have; where nobody says, as many as it had."""
        planned = getattr(self._client.cluster, "plan", ())
        return len(planned) or self._n_most

    def _tell(self, n_rows: float, n_units: int) -> Answer[Any] | None:
        scheduler = self._client.scheduler
        if scheduler is None:  # the client is closed, and its futures say so
            return None
        return self._ask(scheduler.pcm_run(**self._says, n_rows=n_rows, n_units=n_units))

    def _ask(self, coroutine: Coroutine[Any, Any, Any]) -> Answer[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._client.loop.asyncio_loop)


def _wait(answer: Answer[Any] | None, seconds: float) -> None:
    if answer is not None:
        wait([answer], seconds)


def _result(answer: Answer[Any]) -> Any:
    """What was answered; None where the scheduler has no gate, or is gone, which futures say."""
    try:
        return answer.result(0)
    except (OSError, AttributeError, CancelledError):
        return None
