"""The first SIGTERM or SIGUSR1 starts a grace period; only after it does Dask's handler run.

On SIGTERM, Dask closes a worker at once, as if it had died: results in its memory are lost, and
its tasks count as suspects. Here the first signal is a preemption notice: every listener in this
process learns how many seconds are left. A second SIGTERM, or the end of the grace period, does
what the first SIGTERM would have done without us.

This applies only to processes of Dask's own command (``dask worker``) and their worker processes:
in a notebook, signals belong to the user.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from dask_pcm.plugins.time_left import time_left_s

#: A listener; called on the event loop with the seconds that are left.
Told: TypeAlias = Callable[[float], None]

#: What batch systems send (Slurm: SIGUSR1 with ``--signal=B:USR1@60``). SIGINT is the user's.
_NOTICES = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Signals:
    """Turns signals of this process into preemption notices while it has listeners.

    Methods are for the main thread's event loop.
    """

    def __init__(self) -> None:
        self._told: dict[object, Told] = {}
        #: The handlers that ours have replaced.
        self._former: dict[int, Any] = {}
        self._seconds: float | None = None
        self._is_noticed = False
        self._end: asyncio.TimerHandle | None = None

    @property
    def is_listening(self) -> bool:
        """Whether a signal is treated as a notice now."""
        return bool(self._former)

    def listen(self, who: object, tell: Told, seconds: float | None) -> None:
        """Call `tell` when a signal arrives, with a grace period of `seconds`.

        None to ask the batch system then; see ``time_left.py``.

        For the event loop; does nothing if it does not run in the main thread, which alone may
        set handlers.
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
            if found is signal.SIG_DFL or _is_dasks(found):  # leave handlers of others alone
                self._former[number] = signal.signal(number, self._handle)

    def ignore(self, who: object) -> None:
        """Remove a listener; the former handlers are restored with the last one."""
        if self._told.pop(who, None) is not None and not self._told:
            self._restore()

    def _handle(self, number: int, frame: Any) -> None:
        """The signal handler."""
        # Runs between any two bytecodes of the main thread, which may hold a logging lock: no
        # logging here.
        if not self._is_noticed:
            self._is_noticed = True
            self._loop.call_soon_threadsafe(self._begin, number)
        elif number == signal.SIGTERM:
            self._give_up()

    def _begin(self, number: int) -> None:
        """Find out how long the grace period is, and start it; on the event loop."""
        if self._seconds is not None:
            self._tell(self._seconds)
            return
        asked = self._loop.run_in_executor(None, time_left_s, number)
        asked.add_done_callback(lambda found: self._tell(found.result()))

    def _tell(self, seconds: float) -> None:
        """Start the grace period and notify the listeners; on the event loop."""
        if not self._former:  # there is no listener any more, or SIGTERM has come again
            return
        self._end = self._loop.call_later(seconds, self._give_up)
        for tell in list(self._told.values()):
            tell(seconds)

    def _give_up(self) -> None:
        """Do what SIGTERM would have done at first."""
        former = self._former.get(signal.SIGTERM, signal.SIG_DFL)
        self._restore()
        if callable(former):
            former(signal.SIGTERM, None)
        else:
            signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        """Restore the former handlers and cancel the end of the grace period."""
        for number, former in self._former.items():
            if signal.getsignal(number) == self._handle:  # not if replaced since
                signal.signal(number, former)
        self._former.clear()
        self._is_noticed = False
        if self._end is not None:
            self._end.cancel()


def is_command() -> bool:
    """Whether this process runs Dask's own command, which waits for signals."""
    return _is_dasks(signal.getsignal(signal.SIGTERM)) or signals().is_listening


def _is_dasks(handler: Any) -> bool:
    """Whether a handler is the one that Dask's command installs."""
    return getattr(handler, "__module__", None) == "distributed._signals"


@functools.cache
def signals() -> Signals:
    """The instance of this process."""
    return Signals()
