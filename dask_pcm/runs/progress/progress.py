"""How far a run is: its state, counts, rate and ETA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dask_pcm.ledger.decode import known_fields

#: States of a run. One that is starting has not counted its rows yet.
STARTING = "starting"
RUNNING, PAUSED = "running", "paused"
FINISHED, FAILED, CANCELLED = "finished", "failed", "cancelled"
#: Its driver died before the run ended. Never written: readers conclude it.
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run.

    Attributes
    ----------
    state
        ``starting``, ``running``, ``paused``, ``finished``, ``failed``, ``cancelled``; or
        ``interrupted`` if the driver's process has died.
    done, total
        Committed rows, and all rows, of the whole job; parts if rows are not known.
    counted
        Unit of `done` and `total`: ``rows`` or ``parts``.
    failed
        Rows with an error.
    per_s
        Rate of this run, in rows or parts per second; 0 before the first is done.
    n_warm, n_workers
        Workers that hold the contexts, and all workers.
    n_loads
        Contexts built for this run.
    lack
        What has been missing for 10 s and blocks the run, in words: no workers, no answer from the
        scheduler; else empty.
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
        """Seconds until all is done at the current rate; None if there is no rate."""
        if self.state != RUNNING or not self.per_s or self.lack:
            return None
        return (self.total - self.done) / self.per_s

    def as_dict(self) -> dict[str, Any]:
        """Content of a status file."""
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any], **changed: Any) -> Progress:
        """From the content of a status file, `changed` in some fields.

        The file may be of another version, or damaged: unknown fields are ignored, missing ones
        have their defaults.
        """
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


def span(seconds: float) -> str:
    """Format a duration for display.

    >>> span(5), span(300), span(7300), span(200_000)
    ('5 s', '5 min', '2.0 h', '2.3 d')
    """
    # A unit is used from two of it on: "90 min" says more than "1.5 h".
    for unit, size, digits in (("d", 86_400, 1), ("h", 3_600, 1), ("min", 60, 0)):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
