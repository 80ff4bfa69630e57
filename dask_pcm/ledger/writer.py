"""The run that writes an output, as other processes see it."""

from __future__ import annotations

import getpass
import os
import socket
from datetime import UTC, datetime
from typing import Any, NamedTuple


class Writer(NamedTuple):
    """A run that writes an output, and its driver's process.

    Attributes
    ----------
    run
        Identity of the run.
    says
        What its driver wrote about itself (see `whoami`); empty if that cannot be read.
    is_alive
        Whether it is at work.
    """

    run: str
    says: dict[str, Any]
    is_alive: bool

    def __str__(self) -> str:
        about = self.says
        who = f"process {about.get('pid')} of {about.get('user')} on {about.get('host')}"
        return f"run {self.run[:8]} ({who}, begun {about.get('begun')})"


def whoami() -> dict[str, Any]:
    """This process as the driver of a run, for others to read."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        # Containers often have no passwd entry for the user that they run as.
        user = str(os.getuid())
    begun = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"host": socket.gethostname(), "pid": os.getpid(), "user": user, "begun": begun}
