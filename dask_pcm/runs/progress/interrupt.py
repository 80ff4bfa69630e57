"""Ctrl-C between calls to the cluster, not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred(on_asked: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if SIGINT has arrived.

    An interrupt in the middle of a call to the cluster would leave the call half done. The end of
    the block raises too, and a second SIGINT at once. `on_asked` is called when the first arrives.
    Outside the main thread, or with a SIGINT handler of the user's, nothing is changed.
    """
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not is_ours:
        yield lambda: None
        return
    asked = threading.Event()

    def raise_if_asked() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    def note(number: int, frame: Any) -> None:
        raise_if_asked()
        asked.set()
        on_asked()

    signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_if_asked()
