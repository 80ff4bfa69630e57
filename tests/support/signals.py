"""Signals of processes that tests start."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """As ``preexec_fn``: a shell has what it starts in the background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def heed_hangups() -> None:
    """As ``preexec_fn``: in the background of a shell, but not under ``nohup``."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
