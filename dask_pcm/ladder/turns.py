"""Whose turn it is to use a context; nobody waits for whoever waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dask_pcm.errors import DeadlockError
from dask_pcm.ladder.residency import Residency

#: Whoever has had its turn leaves Python's lock for so long to whoever has it now: to begin what
#: runs without that lock takes no longer.
_STEP_ASIDE_S = 5e-4


class Turns:
    """Turns of threads.

    Parameters
    ----------
    changed
        Guards the fields of residencies; notified when a turn, a load or a move ends.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        #: What each thread that waits for its turn waits for.
        self._awaited: dict[int, Residency] = {}
        #: What each thread has its turn with, in the order in which it took them.
        self._used: dict[int, list[Residency]] = {}

    @contextmanager
    def taken(self, residency: Residency) -> Iterator[None]:
        """Be the only thread that uses a context; the same thread may take it again.

        Raises
        ------
        DeadlockError
            As ``wait``.
        """
        me = threading.get_ident()
        with self._changed:
            self._begin_use(residency, me)
        try:
            yield
        finally:
            is_awaited = False
            with self._changed:
                if residency.user == me:  # else it was given back, and is another thread's now
                    residency.n_uses -= 1
                    if not residency.n_uses:
                        self._end_use(residency, me)
                        is_awaited = any(one is residency for one in self._awaited.values())
            if is_awaited:
                time.sleep(_STEP_ASIDE_S)

    def give_back(self) -> list[tuple[Residency, int]]:
        """Let others use what the calling thread uses; returns it, for ``take_again``.

        For a thread that is about to wait for what others do, and does not use it meanwhile.
        """
        me = threading.get_ident()
        with self._changed:
            given = [(residency, residency.n_uses) for residency in self._used.get(me, ())]
            for residency, _ in given:
                self._end_use(residency, me)
        return given

    def take_again(self, given: list[tuple[Residency, int]]) -> None:
        """Wait for the turns that were given back.

        Raises
        ------
        DeadlockError
            As ``wait``; what comes after that one is not taken then.
        """
        me = threading.get_ident()
        with self._changed:
            for residency, n_uses in given:
                self._begin_use(residency, me, n_uses)

    def _begin_use(self, residency: Residency, me: int, n_uses: int = 1) -> None:
        if residency.user != me:
            self.wait(residency, lambda: residency.user is None)
            residency.user = me
            self._used.setdefault(me, []).append(residency)
        residency.n_uses += n_uses

    def _end_use(self, residency: Residency, me: int) -> None:
        residency.user, residency.n_uses = None, 0
        self._used[me] = [one for one in self._used[me] if one is not residency]
        if not self._used[me]:
            del self._used[me]
        self._changed.notify_all()

    def wait(self, residency: Residency, is_so: Callable[[], bool]) -> None:
        """Wait for whoever loads or uses a context; with the guard held.

        Raises
        ------
        DeadlockError
            Where that one waits, perhaps through others, for the calling thread.
        """
        if is_so():
            return
        me = threading.get_ident()
        self._refuse_deadlock(residency, me)
        self._awaited[me] = residency
        try:
            self._changed.wait_for(is_so)
        finally:
            del self._awaited[me]

    def leads_to(self, thread: int, stuck: set[int]) -> bool:
        """Whether a thread is one of those, or waits for one, perhaps through others."""
        while thread not in stuck:
            residency = self._awaited.get(thread)
            if residency is None or residency.user is None:
                return False
            thread = residency.user
        return True

    def _refuse_deadlock(self, wanted: Residency, me: int) -> None:
        """Follow who waits for what: if that leads back here, nobody would ever go on."""
        if wanted.user == me:
            raise DeadlockError(
                f"The loader of context {wanted.ref.name!r} asks for that context itself."
            )
        residency: Residency | None = wanted
        while residency is not None and residency.user is not None:
            residency = self._awaited.get(residency.user)
            if residency is not None and residency.user == me:
                raise DeadlockError(
                    f"Context {residency.ref.name!r} is held or loaded here, and"
                    f" {wanted.ref.name!r} is wanted; whoever holds or loads that, on this worker,"
                    " waits for what is held here. Take both at once, in every task:"
                    " with pcm.acquire(first, second) as (one, other)."
                )
