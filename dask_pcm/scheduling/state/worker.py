"""A worker as the gate sees it: residencies, assigned work and expected end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from dask_pcm.scheduling.events import Group, Work, WorkerJoined
from dask_pcm.tiers import ON_DEVICE, Tier

K = TypeVar("K", bound=Hashable)


class Whereabouts(Enum):
    """Where work is on its worker: on a lane or in the queue for one, there alone, or off it."""

    ON_LANE = "on lane"
    ALONE = "alone"
    OFF_LANE = "off lane"


@dataclass(slots=True)
class WorkerView:
    """The gate's view of one worker; it lags behind the worker by the messages in flight."""

    address: str
    n_lanes: int
    device_bytes: int | None = None
    host: str = ""
    device: str = ""
    pool: str = ""
    joined_at: float = 0.0
    #: When the batch system ends the worker; infinity if unknown.
    ends_at: float = math.inf
    #: How long it had to live when it joined.
    limit_s: float = math.inf
    #: Whether the worker has had notice of its end.
    is_draining: bool = False
    #: Whether that notice was one of preemption.
    is_preempted: bool = False
    is_paused: bool = False
    #: Tier of each context; an absent context has no entry.
    tiers: dict[str, Tier] = field(default_factory=dict)
    #: Bytes of contexts on the device, warm or loading, as far as sizes are known.
    taken_bytes: int = 0
    #: Work on a lane, in the queue for one, or served; by key.
    running: dict[object, Work] = field(default_factory=dict)
    #: Of `running`, the rows that are still served of work that has left its lane; by key.
    served: dict[object, float] = field(default_factory=dict)
    #: Work that has seceded: it waits for other work, and takes no room.
    waiting: dict[object, Work] = field(default_factory=dict)
    #: Of `running`, what had seceded before, and may have found others on the lanes.
    rejoined: set[object] = field(default_factory=set)
    #: Rows in flight that the attendant of a context takes; only contexts that have one.
    serves_rows: dict[str, int] = field(default_factory=dict)
    #: Rows and pieces of work assigned and not ended, by group.
    n_rows: dict[Group, float] = field(default_factory=dict)
    n_works: dict[Group, int] = field(default_factory=dict)
    #: When the current work began: at the last finish, or at the first assignment.
    busy_since: float = 0.0
    #: Seconds of work already done at `busy_since` on what still runs, because lanes alternate.
    ahead_s: float = 0.0
    #: Rows finished since `busy_since`, by group; ``Estimates.settle`` turns them into costs.
    finished: dict[Group, float] = field(default_factory=dict)
    #: When each load in flight was requested.
    loading_since: dict[str, float] = field(default_factory=dict)
    #: Loads in flight that the worker has begun.
    begun: set[str] = field(default_factory=set)
    #: Expected duration of each load, in seconds.
    loading_s: dict[str, float] = field(default_factory=dict)
    #: When work that needs a context last began or ended here, or the context became warm.
    used_at: dict[str, float] = field(default_factory=dict)
    #: Since when each context has been warm.
    warm_since: dict[str, float] = field(default_factory=dict)
    #: Contexts to be evicted once the work that needs them has ended, and for which group.
    evicting: dict[str, Group] = field(default_factory=dict)
    #: Open questions that are answered here, by context.
    n_asked: Counter[str] = field(default_factory=Counter)
    #: Group of isolated work that waits for this worker to be empty.
    reserved_for: Group | None = None

    def give(self, work: Work, now: float) -> None:
        """Record that `work` was assigned to this worker."""
        if not self.running:
            self.busy_since, self.ahead_s = now, 0.0
        self.running[work.key] = work
        self.n_rows[work.group] = self.n_rows.get(work.group, 0.0) + work.n_rows
        self.n_works[work.group] = self.n_works.get(work.group, 0) + 1

    def hand_over(self, key: object, n_rows: float | None) -> None:
        """Record that a piece of work has left its lane; see ``WorkHandedOver``."""
        if n_rows is not None:
            if key in self.running:
                self.served[key] = n_rows
        elif key not in self.waiting and key not in self.served:
            self.waiting[key] = self.take(key)

    def take_back(self, key: object, now: float) -> None:
        """Record that work which had seceded is on a lane again."""
        if key in self.waiting:
            self.rejoined.add(key)
            self.give(self.waiting.pop(key), now)

    def take(self, key: object) -> Work:
        """Remove a piece of work from this worker, and return it."""
        if key in self.waiting:
            return self.waiting.pop(key)
        self.served.pop(key, None)
        self.rejoined.discard(key)
        work = self.running.pop(key)
        self.n_rows[work.group] -= work.n_rows
        self.n_works[work.group] -= 1
        if not self.n_works[work.group]:
            del self.n_rows[work.group], self.n_works[work.group]
        return work

    def where(self, key: object) -> Whereabouts:
        """Where a piece of work is on this worker."""
        if key in self.served or key in self.waiting:
            return Whereabouts.OFF_LANE
        work = self.running.get(key)
        is_alone = work is not None and work.group.is_isolated
        return Whereabouts.ALONE if is_alone else Whereabouts.ON_LANE

    @property
    def n_on_lanes(self) -> int:
        """Pieces of work that are on a lane or in the queue for one."""
        return len(self.running) - len(self.served)

    def has_rows_left(self, group: Group) -> bool:
        """Whether the attendants of a group's contexts take more rows; true without attendants."""
        for context in group.contexts:
            limit = self.serves_rows.get(context)
            if limit is None:
                continue
            works = ((k, w) for k, w in self.running.items() if context in w.group.contexts)
            if sum(self.served.get(key, work.n_rows) for key, work in works) >= limit:
                return False
        return True

    def serves(self, contexts: tuple[str, ...]) -> bool:
        """Whether work that needs `contexts` may be assigned: all warm, none to be evicted."""
        if not self.holds(contexts):
            return False
        return not self.evicting or not any(context in self.evicting for context in contexts)

    def begin_question(self, context: str, now: float) -> None:
        """Record that a question to a context is answered here."""
        self.n_asked[context] += 1
        self.used_at[context] = now

    def end_question(self, context: str, now: float) -> None:
        """Record that one is not any more; none if it was of an earlier life of the worker."""
        self.n_asked -= Counter([context])
        self.used_at[context] = now

    def in_use(self) -> set[str]:
        """Contexts that assigned work and questions need; seceded work still holds its own."""
        groups = [*self.n_rows, *(work.group for work in self.waiting.values())]
        return {*self.n_asked, *(context for group in groups for context in group.contexts)}

    def holds(self, contexts: tuple[str, ...]) -> bool:
        """Whether all of `contexts` are warm."""
        return all(self.tiers.get(context) is Tier.DEVICE for context in contexts)

    def has(self, contexts: tuple[str, ...]) -> bool:
        """Whether all of `contexts` are warm or loading."""
        return all(self.tiers.get(context) in ON_DEVICE for context in contexts)

    def missing(self, contexts: tuple[str, ...]) -> tuple[str, ...]:
        """Of `contexts`, those neither warm nor loading."""
        return tuple(c for c in contexts if self.tiers.get(c) not in ON_DEVICE)

    def failed(self, contexts: tuple[str, ...]) -> str | None:
        """The first of `contexts` whose load failed here, or None."""
        failed = (c for c in contexts if self.tiers.get(c) is Tier.FAILED)
        return next(failed, None)

    @property
    def free_bytes(self) -> float:
        """Bytes free for contexts on the device, by known sizes; infinity if unlimited."""
        return math.inf if self.device_bytes is None else self.device_bytes - self.taken_bytes

    @property
    def has_isolated_work(self) -> bool:
        """Whether isolated work runs here; nothing else may be assigned meanwhile."""
        return any(group.is_isolated for group in self.n_rows)

    def set_tier(self, context: str, tier: Tier, n_bytes: int) -> None:
        """Move a context of `n_bytes` bytes to `tier`."""
        before = self.tiers.pop(context, Tier.ABSENT)
        if tier is not Tier.ABSENT:
            self.tiers[context] = tier
        self.taken_bytes += n_bytes * ((tier in ON_DEVICE) - (before in ON_DEVICE))

    def load(self, context: str, n_bytes: int, expected_s: float, now: float) -> None:
        """Record that the worker was asked to load a context."""
        self.loading_s[context] = expected_s
        self.loading_since[context] = now
        self.set_tier(context, Tier.LOADING, n_bytes)

    def report_tier(self, context: str, tier: Tier, n_bytes: int, now: float) -> None:
        """Take in the worker's own report of where a context is."""
        self.set_tier(context, tier, n_bytes)
        if tier is not Tier.DEVICE:
            self.evicting.pop(context, None)
        if tier is Tier.LOADING:
            self.begun.add(context)
        else:
            self.begun.discard(context)
            self.loading_since.pop(context, None)
        if tier is Tier.DEVICE:
            self.used_at[context] = self.warm_since[context] = now

    def validate(self, sizes: Mapping[str, int]) -> None:
        """Raise AssertionError if the counters contradict the work and tiers that they sum up."""
        assert self.served.keys() <= self.running.keys()
        assert not self.waiting.keys() & self.running.keys()
        groups = [work.group for work in self.running.values()]
        assert self.n_works == {group: groups.count(group) for group in set(groups)}
        assert self.n_rows.keys() == self.n_works.keys()
        on_device = [context for context, tier in self.tiers.items() if tier in ON_DEVICE]
        assert self.taken_bytes == sum(sizes.get(c, 0) for c in on_device), self.address
        assert Tier.ABSENT not in self.tiers.values(), self.address
        for context in self.evicting:
            assert self.tiers.get(context) is Tier.DEVICE, (self.address, context)
        assert self.rejoined <= self.running.keys()
        if self.has_isolated_work and not self.rejoined:
            assert len(self.running) == 1, self.running


def select_begun(
    works: Mapping[K, Whereabouts], priorities: Mapping[K, tuple[float, ...]], n_lanes: int
) -> list[K]:
    """Select the work that a worker had begun when it was lost.

    That which had left its lane, and the first others by priority, one per lane. Isolated work that
    was on a lane is the cause by itself, and not what only waited for others.
    """
    if alone := [key for key, where in works.items() if where is Whereabouts.ALONE]:
        return alone
    off_lane = [key for key, where in works.items() if where is Whereabouts.OFF_LANE]
    others = [key for key in works if key not in off_lane]
    return off_lane + sorted(others, key=lambda key: priorities[key])[:n_lanes]


def joined(event: WorkerJoined, now: float) -> WorkerView:
    """The view of a worker that has just joined, `now` in seconds of the policy's clock."""
    return WorkerView(
        event.worker,
        event.n_lanes,
        event.device_bytes,
        event.host,
        event.device,
        event.pool or event.device,
        joined_at=now,
        ends_at=now + event.ends_in_s,
        limit_s=event.ends_in_s,
    )


def remaining_s(expected_s: float, elapsed_s: float) -> float:
    """Seconds that something is still expected to take, after `elapsed_s` seconds.

    Once overdue, it is expected to take as long again as it is overdue. Otherwise a load that
    hangs would look like the earliest finish for ever, and work would wait for it.

    >>> remaining_s(5.0, 2.0), remaining_s(5.0, 15.0)
    (3.0, 10.0)
    """
    return abs(expected_s - elapsed_s)
