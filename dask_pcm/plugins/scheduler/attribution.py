"""Whose fault it is that a worker is gone: its machine's, or that of what ran there.

A worker process that ends while its nanny lives on has ended by itself: killed for its memory, or
by a crash of native code. What it had in work is to blame, and runs alone from then on, so that the
next loss tells which. Where the nanny or the machine went too, nobody is: that was preemption.

Dask blames every task that a lost worker had, and ends one with ``KilledWorker`` after the fourth
loss. For tasks of the gate it counts only those that were theirs.
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

#: A nanny that is taken down as well may live so much longer.
_GRACE_S = 1.0
_LOOK_S, _TIMEOUT_S = 0.5, 2.0
#: A nanny that has started no other worker by then does not do that.
_LONGEST_S = 20.0
#: A nanny that was out of reach is back within so many seconds, if it is.
_BACK_S = 60.0
#: Without a nanny, so many losses are too many for preemption.
_MANY = 20


@dataclass(eq=False, slots=True)
class Loss:
    """A worker that is gone, and the tasks that it had in work."""

    nanny: str
    keys: tuple[Any, ...]
    judged: asyncio.Event = field(default_factory=asyncio.Event)


class Attribution:
    """Losses of workers, and what they mean for the tasks that they had.

    Attributes
    ----------
    on_judged
        Called with the keys of a loss once it is clear who is to blame.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.on_judged: Callable[[Iterable[Any]], None] = lambda keys: None
        self._open: list[Loss] = []
        self._forgiven: deque[tuple[float, Loss]] = deque(maxlen=100)
        self._tasks: set[asyncio.Task[None]] = set()
        #: Losses that each task was there for; those that are its fault, since it last asked.
        self.n_lost: Counter[Any] = Counter()
        self.n_blamed: Counter[Any] = Counter()
        #: Tasks that run alone.
        self.suspects: set[Any] = set()

    def lost(self, nanny: str, keys: Iterable[Any]) -> None:
        """A worker is gone that nobody had asked to go, with tasks in work."""
        loss = Loss(nanny, tuple(keys))
        self.n_lost.update(loss.keys)
        self._open.append(loss)
        task = asyncio.get_running_loop().create_task(self._look(loss))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def joined(self, nanny: str) -> None:
        """A nanny has started a worker."""
        if not nanny:
            return
        for loss in [loss for loss in self._open if loss.nanny == nanny]:
            self._judge(loss, True)
        now = monotonic()
        for at, loss in list(self._forgiven):
            if loss.nanny == nanny and now - at < _BACK_S:  # it was only out of reach
                self._blame(loss.keys)
            if loss.nanny == nanny or now - at >= _BACK_S:
                self._forgiven.remove((at, loss))

    def is_open(self, key: Any) -> bool:
        """Whether a task was lost again, and it is not clear yet what its losses mean."""
        return self.n_lost[key] > 1 and any(key in loss.keys for loss in self._open)

    async def ask(self, key: Any) -> int:
        """How many processes a task has cost since it was last asked; a task that goes on asks."""
        for loss in [loss for loss in self._open if key in loss.keys]:
            await loss.judged.wait()
        return self.n_blamed.pop(key, 0)

    def forget(self, key: Any) -> None:
        """A task is over; whatever comes out of its losses, a later one of that key is another."""
        self.n_lost.pop(key, None)
        self.n_blamed.pop(key, None)
        self.suspects.discard(key)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for loss in self._open:
            loss.judged.set()
        self._open.clear()

    async def _look(self, loss: Loss) -> None:
        """Forgive a loss where the nanny is gone as well; else it starts another worker.

        Where there was no nanny nobody can say: forgiven, but not for ever.
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
        try:
            await asyncio.wait_for(self._scheduler.rpc(nanny).identity(), _TIMEOUT_S)
        except (OSError, TimeoutError):
            return False
        return True

    def _judge(self, loss: Loss, is_blamed: bool) -> None:
        if loss.judged.is_set():
            return
        self._open.remove(loss)
        loss.judged.set()
        logger.info(
            "A worker of %s was lost with %d tasks: %s",
            loss.nanny or "no nanny",
            len(loss.keys),
            "its process has ended by itself" if is_blamed else "the machine took it away",
        )
        if is_blamed:
            self._blame(loss.keys)
        else:
            self._forgiven.append((monotonic(), loss))
        self.on_judged(loss.keys)

    def _blame(self, keys: Iterable[Any]) -> None:
        present = [key for key in keys if key in self.n_lost]  # not over meanwhile
        self.n_blamed.update(present)
        self.suspects.update(present)
