"""The record of a simulation: counters, times, and spans of chosen workers."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

STAGE, LOAD, WORK, FAILED = "stage", "load", "work", "failed"


@dataclass(frozen=True, slots=True)
class Span:
    """One activity of a worker, in simulated seconds."""

    worker: str
    what: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Record:
    """Records events; spans only of the `chosen` workers. Times are simulated seconds."""

    chosen: frozenset[str] = frozenset()
    spans: list[Span] = field(default_factory=list)
    #: When rows were committed, and how many.
    done_at_s: array[float] = field(default_factory=lambda: array("d"))
    done_rows: array[float] = field(default_factory=lambda: array("d"))
    n_rows: float = 0.0
    n_joined: int = 0
    n_lost: int = 0
    n_loads: int = 0
    n_failed_loads: int = 0
    n_dispatches: int = 0
    rows_redone: float = 0.0
    rows_failed: float = 0.0
    lost_s: float = 0.0
    load_s: float = 0.0
    wasted_s: float = 0.0
    joined_s: dict[str, float] = field(default_factory=dict)
    left_s: dict[str, float] = field(default_factory=dict)
    #: When each worker was first warm, and when it first began to infer.
    warm_s: dict[str, float] = field(default_factory=dict)
    first_work_s: dict[str, float] = field(default_factory=dict)
    last_change_s: float = 0.0
    _built: set[tuple[str, str]] = field(default_factory=set)
    _unproven_s: dict[str, float] = field(default_factory=dict)

    def joined(self, worker: str, now: float) -> None:
        """A worker has joined."""
        self.n_joined += 1
        self.joined_s[worker] = self.last_change_s = now

    def left(self, worker: str, now: float) -> None:
        """A worker has left; loads that it never used count as wasted."""
        self.n_lost += 1
        self.left_s[worker] = now
        self.wasted_s += self._unproven_s.pop(worker, 0.0)

    def loaded(self, worker: str, context: str, start_s: float, now: float) -> None:
        """A context is warm; a second build on the same worker counts as wasted."""
        self.n_loads += 1
        self.load_s += now - start_s
        if (worker, context) in self._built:
            self.wasted_s += now - start_s
        else:
            self._built.add((worker, context))
            self._unproven_s[worker] = self._unproven_s.get(worker, 0.0) + now - start_s
        self.warm_s.setdefault(worker, now)
        self.last_change_s = now

    def load_failed(self, worker: str, start_s: float, now: float) -> None:
        """A load failed, or its worker was lost meanwhile."""
        self.n_failed_loads += 1
        self.load_s += now - start_s
        self.wasted_s += now - start_s
        self.span(worker, FAILED, start_s, now)

    def began(self, worker: str, now: float) -> None:
        """A worker has begun to infer, so its loads were not wasted."""
        self.first_work_s.setdefault(worker, now)
        self._unproven_s.pop(worker, None)

    def done(self, n_rows: float, now: float) -> None:
        """Rows were committed."""
        self.n_rows += n_rows
        self.done_at_s.append(now)
        self.done_rows.append(n_rows)
        self.last_change_s = now

    def lost(self, n_rows: float, seconds: float) -> None:
        """Rows were inferred, fully or in part, and lost."""
        self.rows_redone += n_rows
        self.lost_s += seconds

    def span(self, worker: str, what: str, start_s: float, end_s: float) -> None:
        """Record an activity, if the worker is a chosen one."""
        if worker in self.chosen:
            self.spans.append(Span(worker, what, start_s, end_s))
