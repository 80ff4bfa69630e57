"""Signals by which a batch system says that a ``dask worker`` is about to be ended.

On SIGTERM, Dask closes a worker at once, as one that has died: what is in memory there is lost,
and its tasks count as those that may have killed it. Here the first signal is a notice, and all
that has to do with a worker in this process is told how long it still has. The second SIGTERM, and
the end of that time, do what the first would have done without us.

Only in a process that Dask's own command waits for signals in, and in worker processes of such: in
a notebook, signals are the user's.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

#: Called on the event loop with the seconds that are left.
Told: TypeAlias = Callable[[float], None]

#: What batch systems send (Slurm the second with ``--signal=B:USR1@60``). SIGINT is the user's.
_NOTICES = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Signals:
    """The signals of this process, while somebody heeds them."""

    def __init__(self) -> None:
        self._told: dict[object, Told] = {}
        #: The handlers that ours stand in for.
        self._former: dict[int, Any] = {}
        self._seconds = 0.0
        self._is_noticed = False
        self._end: asyncio.TimerHandle | None = None

    @property
    def are_heeded(self) -> bool:
        """Whether a signal is a notice now."""
        return bool(self._former)

    def heed(self, who: object, tell: Told, seconds: float) -> None:
        """Have `tell` called when a signal comes, `seconds` before the end.

        On the event loop; nothing happens where that is not the main thread's.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._told[who] = tell
        self._seconds = seconds
        if self._former:
            return
        self._loop = asyncio.get_running_loop()
        for number in _NOTICES:
            found = signal.getsignal(number)
            if found is signal.SIG_DFL or _is_dasks(found):  # else it is somebody else's
                self._former[number] = signal.signal(number, self._handle)

    def leave(self, who: object) -> None:
        """It heeds signals no longer; when nobody does, the former handlers are back."""
        if self._told.pop(who, None) is not None and not self._told:
            self._put_back()

    def _handle(self, number: int, frame: Any) -> None:
        # Anywhere between two instructions of the main thread: nothing is logged here.
        if not self._is_noticed:
            self._is_noticed = True
            self._loop.call_soon_threadsafe(self._tell)
        elif number == signal.SIGTERM:
            self._give_up()

    def _tell(self) -> None:
        self._end = self._loop.call_later(self._seconds, self._give_up)
        for tell in list(self._told.values()):
            tell(self._seconds)

    def _give_up(self) -> None:
        """Do what SIGTERM would have done at once."""
        former = self._former.get(signal.SIGTERM, signal.SIG_DFL)
        self._put_back()
        if callable(former):
            former(signal.SIGTERM, None)
        else:
            signal.raise_signal(signal.SIGTERM)

    def _put_back(self) -> None:
        for number, former in self._former.items():
            if signal.getsignal(number) == self._handle:  # else somebody has replaced it since
                signal.signal(number, former)
        self._former.clear()
        self._is_noticed = False
        if self._end is not None:
            self._end.cancel()


def is_command() -> bool:
    """Whether this process is one in which Dask's own command waits for signals."""
    return _is_dasks(signal.getsignal(signal.SIGTERM)) or signals().are_heeded


def _is_dasks(handler: Any) -> bool:
    return getattr(handler, "__module__", None) == "distributed._signals"


@functools.cache
def signals() -> Signals:
    """Those of this process."""
    return Signals()
