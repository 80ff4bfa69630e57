"""Failure attribution: a lost worker counts against its tasks only if its nanny survives.

A worker process that ends while its nanny lives ended by itself: out of memory, or a crash in
native code. The tasks that it had begun become suspects. Suspects run isolated, so that the next
loss identifies the cause. If the nanny or the machine is gone too, it was a preemption, which never
counts as a failure.

Dask counts every loss against every task of the worker and ends a task with ``KilledWorker`` after
the fourth. For tasks of the gate, only losses attributed to them count.

Everything here runs on the scheduler's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler
from distributed.metrics import monotonic

logger = logging.getLogger(__name__)

#: How long a nanny that is preempted as well may outlive its worker.
_GRACE_S = 1.0
#: Interval and timeout of the requests that check whether a nanny is alive.
_LOOK_S, _TIMEOUT_S = 0.5, 2.0
#: A nanny that lives but has started no worker by then: the loss is attributed to the tasks.
_LONGEST_S = 20.0
#: What is back within this time was not preempted: a nanny out of reach, a process restarted.
_BACK_S = 60.0
#: Without a nanny, more losses than this are not explained by preemption.
_MANY = 20


@dataclass(eq=False, slots=True)
class Loss:
    """A lost worker.

    Attributes
    ----------
    nanny
        Its nanny; empty if it had none.
    keys
        The tasks that it had begun.
    """

    nanny: str
    keys: tuple[Any, ...]
    judged: asyncio.Event = field(default_factory=asyncio.Event)


class Attribution:
    """Decides for each lost worker whether its tasks are suspects.

    Attributes
    ----------
    on_judged
        Called with the keys of a loss once it is attributed.
    on_loads_blamed
        Called with a worker, its node, and the contexts whose loads have ended the process before.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.on_judged: Callable[[Iterable[Any]], None] = lambda keys: None
        self.on_loads_blamed: Callable[[str, str, tuple[str, ...]], None] = lambda *loads: None
        self._open: list[Loss] = []
        #: Loads that lost workers had begun, by node: when, and which.
        self._loads: deque[tuple[float, str, tuple[str, ...]]] = deque(maxlen=1000)
        self._forgiven: deque[tuple[float, Loss]] = deque(maxlen=100)
        self._tasks: set[asyncio.Task[None]] = set()
        #: Per task: all losses that it was part of; those attributed to it since it last asked.
        self.n_lost: Counter[Any] = Counter()
        self.n_blamed: Counter[Any] = Counter()
        #: Tasks that run isolated.
        self.suspects: set[Any] = set()

    def lost(
        self, nanny: str, keys: Iterable[Any], host: str = "", loads: Iterable[str] = ()
    ) -> None:
        """Begin to attribute a loss of a worker that had begun these tasks and loads."""
        if loads := tuple(loads):
            self._loads.append((monotonic(), host, loads))
        if not (keys := tuple(keys)):
            return
        loss = Loss(nanny, keys)
        self.n_lost.update(loss.keys)
        self._open.append(loss)
        task = asyncio.get_running_loop().create_task(self._look(loss))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def joined(self, nanny: str, worker: str = "", host: str = "") -> None:
        """A nanny has started a worker: its open losses are attributed to their tasks.

        Loads are attributed by node: where memory is short, the kernel ends the nanny as well, and
        the batch system starts both again.
        """
        self._blame_loads(worker, host)
        if not nanny:
            return
        for loss in [loss for loss in self._open if loss.nanny == nanny]:
            self._judge(loss, True)
        now = monotonic()
        for at, loss in list(self._forgiven):
            # The nanny survived after all: what looked like a preemption was a network failure.
            if loss.nanny == nanny and now - at < _BACK_S:
                self._blame(loss.keys)
            if loss.nanny == nanny or now - at >= _BACK_S:
                self._forgiven.remove((at, loss))

    def _blame_loads(self, worker: str, host: str) -> None:
        """Attribute the process ends of a node to the loads that were under way."""
        now = monotonic()
        recent = [one for one in self._loads if now - one[0] < _BACK_S]
        blamed = dict.fromkeys(load for _, node, loads in recent if node == host for load in loads)
        self._loads = deque((one for one in recent if one[1] != host), maxlen=self._loads.maxlen)
        if blamed:
            self.on_loads_blamed(worker, host, tuple(blamed))

    def is_open(self, key: Any) -> bool:
        """Whether a task was lost more than once and a loss is not attributed yet."""
        return self.n_lost[key] > 1 and any(key in loss.keys for loss in self._open)

    async def ask(self, key: Any) -> int:
        """Return how many losses were attributed to a task since the last call; wait for open ones.

        The count restarts at zero: a task that asks must have made progress in between.
        """
        for loss in [loss for loss in self._open if key in loss.keys]:
            await loss.judged.wait()
        return self.n_blamed.pop(key, 0)

    def forget(self, key: Any) -> None:
        """A task has ended: its losses do not count against a later task with the same key."""
        self.n_lost.pop(key, None)
        self.n_blamed.pop(key, None)
        self.suspects.discard(key)

    def restarted(self) -> None:
        """All workers are restarted on request: loads that end now are not to blame."""
        self._loads.clear()

    def close(self) -> None:
        """Stop attributing; wake everything that waits for a result."""
        for task in self._tasks:
            task.cancel()
        for loss in self._open:
            loss.judged.set()
        self._open.clear()

    async def _look(self, loss: Loss) -> None:
        """Attribute a loss: to a preemption if the nanny is gone too, else to its tasks.

        Without a nanny the cause is unknown: counted as a preemption, up to a limit.
        """
        if not loss.nanny:
            self._judge(loss, any(self.n_lost[key] > _MANY for key in loss.keys))
            return
        deadline = monotonic() + _LONGEST_S
        await asyncio.sleep(_GRACE_S)
        while not loss.judged.is_set() and monotonic() < deadline:
            if not await self._lives(loss.nanny):
                self._judge(loss, False)
                return
            await asyncio.sleep(_LOOK_S)
        self._judge(loss, True)

    async def _lives(self, nanny: str) -> bool:
        """Whether a nanny answers."""
        try:
            await asyncio.wait_for(self._scheduler.rpc(nanny).identity(), _TIMEOUT_S)
        except (OSError, TimeoutError):
            return False
        return True

    def _judge(self, loss: Loss, is_blamed: bool) -> None:
        """Close a loss, once: the check and a nanny's new worker may both try to."""
        if loss.judged.is_set():
            return
        self._open.remove(loss)
        loss.judged.set()
        logger.info(
            "A worker of %s was lost with %d tasks: %s",
            loss.nanny or "no nanny",
            len(loss.keys),
            "its process ended by itself" if is_blamed else "it was preempted",
        )
        if is_blamed:
            self._blame(loss.keys)
        else:
            self._forgiven.append((monotonic(), loss))
        self.on_judged(loss.keys)

    def _blame(self, keys: Iterable[Any]) -> None:
        """Attribute a loss to tasks, which become suspects."""
        present = [key for key in keys if key in self.n_lost]  # skip tasks that ended meanwhile
        self.n_blamed.update(present)
        self.suspects.update(present)
