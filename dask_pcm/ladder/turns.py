"""Turns on exclusive contexts: one task at a time, and a wait that would deadlock raises."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dask_pcm.errors import DeadlockError
from dask_pcm.ladder.residency import Residency

#: How long a thread sleeps after its turn if another waits, at most, and as a share of its turn.
#: Otherwise it might keep Python's GIL and delay the next user, which needs some milliseconds to
#: start a call that releases the GIL. After a short turn the device would wait for this thread.
_STEP_ASIDE_S, _STEP_ASIDE_SHARE = 4e-3, 0.1


class Turns:
    """Gives threads turns on exclusive contexts and refuses waits that would deadlock.

    Methods may be called from any thread.

    Parameters
    ----------
    changed
        Guards the fields of residencies; notified when a turn, a load or a move ends.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        #: The context that each waiting thread waits for: the edges of the wait-for graph.
        self._awaited: dict[int, Residency] = {}
        #: The contexts on which each thread has its turn, in the order in which it took them.
        self._used: dict[int, list[Residency]] = {}

    def begin(self, residency: Residency) -> None:
        """Begin to use a context exclusively; reentrant for this thread.

        Raises
        ------
        DeadlockError
            See ``wait``.
        """
        with self._changed:
            self._begin_use(residency, threading.get_ident())

    def end(self, residency: Residency) -> None:
        """End what ``begin`` began; steps aside if another thread waits for the context."""
        me, is_awaited, turn_s = threading.get_ident(), False, 0.0
        with self._changed:
            # Otherwise the turn was given back and belongs to another thread by now.
            if residency.user == me:
                residency.n_uses -= 1
                if not residency.n_uses:
                    turn_s = time.monotonic() - residency.turn_began
                    self._end_use(residency, me)
                    is_awaited = any(one is residency for one in self._awaited.values())
        if is_awaited:
            time.sleep(min(_STEP_ASIDE_S, _STEP_ASIDE_SHARE * turn_s))

    def give_back(self) -> list[tuple[Residency, int]]:
        """Give up the calling thread's turns, and return them for ``take_again``.

        For a thread that is about to wait for other tasks, which may need the same contexts.
        """
        me = threading.get_ident()
        with self._changed:
            given = [(residency, residency.n_uses) for residency in self._used.get(me, ())]
            for residency, _ in given:
                self._end_use(residency, me)
        return given

    def take_again(self, given: list[tuple[Residency, int]]) -> None:
        """Wait for the turns that ``give_back`` returned.

        Raises
        ------
        DeadlockError
            See ``wait``; the turns after the refused one are not taken.
        """
        me = threading.get_ident()
        with self._changed:
            for residency, n_uses in given:
                self._begin_use(residency, me, n_uses)

    def _begin_use(self, residency: Residency, me: int, n_uses: int = 1) -> None:
        """Wait for a turn and enter it `n_uses` times; with the lock held."""
        if residency.user != me:
            self.wait(residency, lambda: residency.user is None)
            residency.user, residency.turn_began = me, time.monotonic()
            self._used.setdefault(me, []).append(residency)
        residency.n_uses += n_uses

    def _end_use(self, residency: Residency, me: int) -> None:
        """End a turn, however often it was entered; with the lock held."""
        residency.user, residency.n_uses = None, 0
        self._used[me] = [one for one in self._used[me] if one is not residency]
        if not self._used[me]:
            del self._used[me]
        self._changed.notify_all()

    def wait(self, residency: Residency, is_so: Callable[[], bool]) -> None:
        """Wait until `is_so`, for the thread that moves or uses a context; with the lock held.

        Raises
        ------
        DeadlockError
            If that thread waits, directly or through others, for the calling thread.
        """
        if is_so():
            return
        me = threading.get_ident()
        self._refuse_deadlock(residency, me)
        self._awaited[me] = residency
        try:
            while not is_so():
                self._changed.wait()
        finally:
            del self._awaited[me]

    def leads_to(self, thread: int, stuck: set[int]) -> bool:
        """Whether `thread` is in `stuck`, or waits for one of these, directly or through others."""
        while thread not in stuck:
            residency = self._awaited.get(thread)
            if residency is None or residency.user is None:
                return False
            thread = residency.user
        return True

    def _refuse_deadlock(self, wanted: Residency, me: int) -> None:
        """Raise DeadlockError if the chain of waits that starts at `wanted` leads to this thread.

        The chain has no cycle: every edge was checked here before it was added.
        """
        if wanted.user == me:
            raise DeadlockError(
                f"The loader of context {wanted.ref.name!r} asks for that context itself."
            )
        residency: Residency | None = wanted
        while residency is not None and residency.user is not None:
            residency = self._awaited.get(residency.user)
            if residency is not None and residency.user == me:
                raise DeadlockError(
                    f"Deadlock: this task holds or loads context {residency.ref.name!r} and wants"
                    f" {wanted.ref.name!r}; the task on this worker that holds or loads that one"
                    " waits for this task. Acquire both in one call, in every task:"
                    " with pcm.acquire(first, second) as (one, other)."
                )
