"""A worker as the gate sees it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dask_pcm.scheduling.events import Group, Work
from dask_pcm.tiers import ON_DEVICE, Tier

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class WorkerView:
    """A worker: what it holds, what it was given, and how long it will be there."""

    address: str
    n_lanes: int
    device_bytes: int | None = None
    host: str = ""
    device: str = ""
    pool: str = ""
    joined_at: float = 0.0
    #: When the batch system ends it, as far as that is known.
    ends_at: float = math.inf
    #: Whether it has been told of its end.
    is_draining: bool = False
    is_paused: bool = False
    #: What is cold has none.
    tiers: dict[str, Tier] = field(default_factory=dict)
    #: What takes room on the device, as far as sizes are known.
    taken_bytes: int = 0
    running: dict[object, Work] = field(default_factory=dict)
    #: Rows, and pieces of work, on their way or in work, by group.
    n_rows: dict[Group, float] = field(default_factory=dict)
    n_works: dict[Group, int] = field(default_factory=dict)
    #: When what is running now began to be worked on: the last finish, or the first assignment.
    busy_since: float = 0.0
    #: Seconds of work that had been done by then on what still runs: lanes take turns.
    ahead_s: float = 0.0
    #: Rows finished since `busy_since`, by group; turned into costs by ``GateState.settle``.
    finished: dict[Group, float] = field(default_factory=dict)
    #: When each load that is under way was asked for.
    loading_since: dict[str, float] = field(default_factory=dict)
    #: Those of them that the worker has begun.
    begun: set[str] = field(default_factory=set)
    #: How long each was expected to take.
    loading_s: dict[str, float] = field(default_factory=dict)
    #: When work that needs a context was last begun or ended here, or the context became warm.
    used_at: dict[str, float] = field(default_factory=dict)
    #: Since when each context has been warm.
    warm_since: dict[str, float] = field(default_factory=dict)
    #: Contexts that are to make room as soon as what needs them here has ended, and for whom.
    leaving: dict[str, Group] = field(default_factory=dict)
    #: Work that needs this worker for itself, and waits until it is empty.
    reserved_for: Group | None = None

    def give(self, work: Work, now: float) -> None:
        """It is given a piece of work."""
        if not self.running:
            self.busy_since, self.ahead_s = now, 0.0
        self.running[work.key] = work
        self.n_rows[work.group] = self.n_rows.get(work.group, 0.0) + work.n_rows
        self.n_works[work.group] = self.n_works.get(work.group, 0) + 1

    def take(self, key: object) -> Work:
        """A piece of work is not there any more."""
        work = self.running.pop(key)
        self.n_rows[work.group] -= work.n_rows
        self.n_works[work.group] -= 1
        if not self.n_works[work.group]:
            del self.n_rows[work.group], self.n_works[work.group]
        return work

    def begun_of(self, priorities: Mapping[K, tuple[float, ...]]) -> list[K]:
        """Of tasks that it had, those that it had begun: as many as lanes, the first to go."""
        return sorted(priorities, key=lambda key: priorities[key])[: self.n_lanes]

    def serves(self, contexts: tuple[str, ...]) -> bool:
        """Whether work that needs these may be sent here now."""
        if not self.holds(contexts):
            return False
        return not self.leaving or not any(context in self.leaving for context in contexts)

    def in_use(self) -> set[str]:
        """Contexts that what was sent here needs."""
        return {context for group in self.n_rows for context in group.contexts}

    def holds(self, contexts: tuple[str, ...]) -> bool:
        return all(self.tiers.get(context) is Tier.DEVICE for context in contexts)

    def has(self, contexts: tuple[str, ...]) -> bool:
        """Whether it holds these, or is about to."""
        return all(self.tiers.get(context) in ON_DEVICE for context in contexts)

    def missing(self, contexts: tuple[str, ...]) -> tuple[str, ...]:
        """Of `contexts`, those neither warm nor loading."""
        return tuple(c for c in contexts if self.tiers.get(c) not in ON_DEVICE)

    def failed(self, contexts: tuple[str, ...]) -> str | None:
        """One of `contexts` that could not be loaded here."""
        failed = (c for c in contexts if self.tiers.get(c) is Tier.FAILED)
        return next(failed, None)

    @property
    def is_taken(self) -> bool:
        """Whether what runs here has the worker for itself."""
        return any(group.is_isolated for group in self.n_rows)


def still_s(expected_s: float, elapsed_s: float) -> float:
    """Seconds that something is still expected to take; overdue, as long again as it is overdue.

    So that nobody waits for ever for what hangs, thinking that it must end any moment.

    >>> still_s(5.0, 2.0), still_s(5.0, 15.0)
    (3.0, 10.0)
    """
    return abs(expected_s - elapsed_s)
