"""How a run stands, for whoever looks: the process that drives it, or any other."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from dask_pcm.ledger.decode import known_fields

#: While it looks at what is there, it has not counted yet.
STARTING = "starting"
RUNNING, PAUSED = "running", "paused"
FINISHED, FAILED, CANCELLED = "finished", "failed", "cancelled"
#: Nobody drives it, and it did not end by itself: its driver died.
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes
    ----------
    state
        ``starting``, ``running``, ``paused``, ``finished``, ``failed``, ``cancelled``; or
        ``interrupted``, where the process that drove the run is gone.
    done, total
        Rows of the whole job that are committed, and all; parts where rows are not known.
    counted
        What `done` and `total` count: ``rows`` or ``parts``.
    failed
        Rows with an error.
    per_s
        What this run has done a second; 0 before it has done anything.
    n_warm, n_workers
        Workers that hold the contexts, and all.
    n_loads
        Contexts built for this run.
    lack
        What it has been without for 10 s and cannot go on without, in words: no workers, no answer
        from the scheduler; else empty.
    """

    state: str
    done: int
    total: int
    counted: str = "rows"
    failed: int = 0
    per_s: float = 0.0
    n_warm: int = 0
    n_workers: int = 0
    n_loads: int = 0
    lack: str = ""

    @property
    def eta_s(self) -> float | None:
        """Seconds until all is done at this pace; None if it cannot be told."""
        if self.state != RUNNING or not self.per_s or self.lack:
            return None
        return (self.total - self.done) / self.per_s

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any], **changed: Any) -> Progress:
        """From a status file, whatever version of it, and whatever became of it."""
        known = known_fields(cls, found)
        return cls(**{"state": INTERRUPTED, "done": 0, "total": 0, **known, **changed})

    def __str__(self) -> str:
        share = f" ({self.done / self.total:.1%})" if self.total else ""
        text = f"{self.state}: {self.done:,}/{self.total:,} {self.counted}{share}"
        text += f", {self.failed:,} failed"
        if self.state in (RUNNING, PAUSED):
            warm = f"{self.n_warm}/{self.n_workers} workers warm"
            text += f", {self.per_s:,.0f}/s, {self.lack or warm}"
        return text + (f", ETA {span(self.eta_s)}" if self.eta_s is not None else "")


class Writer(NamedTuple):
    """Who drives a run."""

    run: str
    says: dict[str, Any]
    is_alive: bool

    def __str__(self) -> str:
        about = self.says
        who = f"process {about.get('pid')} of {about.get('user')} on {about.get('host')}"
        return f"run {self.run[:8]} ({who}, begun {about.get('begun')})"


def whoami() -> dict[str, Any]:
    """Who drives a run, for others to read."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for the user
        user = str(os.getuid())
    begun = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"host": socket.gethostname(), "pid": os.getpid(), "user": user, "begun": begun}


def span(seconds: float) -> str:
    """A duration for people.

    >>> span(5), span(300), span(7300), span(200_000)
    ('5 s', '5 min', '2.0 h', '2.3 d')
    """
    for unit, size, digits in (("d", 86_400, 1), ("h", 3_600, 1), ("min", 60, 0)):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
