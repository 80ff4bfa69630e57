"""Work ahead: what waits, what runs will submit, and whose turn it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from dask_pcm.scheduling.events import Group, Work
from dask_pcm.scheduling.learned.fairness import Shares
from dask_pcm.scheduling.state.queue import WorkQueue
from dask_pcm.scheduling.state.runs import Runs


@dataclass(slots=True)
class WorkAhead:
    """Work that is on no worker yet: waiting at the gate, or announced by a run."""

    waiting: WorkQueue = field(default_factory=WorkQueue)
    runs: Runs = field(default_factory=Runs)
    shares: Shares = field(default_factory=Shares)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def park(self, work: Work, was_known: bool) -> bool:
        """Add waiting work; return whether it is the first of its group.

        Work that is parked again (`was_known`) was subtracted from its run's forecast before.
        """
        if not was_known:
            self.runs.record_submitted(work)
        is_first = self.waiting.add(work)
        self.shares.add_work(work.group.client)
        return is_first

    def unpark(self, key: object) -> Work | None:
        """Remove and return the work of a key; None if it does not wait."""
        work = self.waiting.remove(key)
        if work is not None:
            self.shares.remove_work(work.group.client)
        return work

    def groups(self) -> list[Group]:
        """Groups with waiting or expected work, the most urgent waiting work first."""
        # Groups do not compare; among equals the order of the queues holds.
        urgent = sorted(
            (self.urgency(group), next(self._order), group) for group in self.waiting.queues
        )
        return list(dict.fromkeys([group for *_, group in urgent]) | self.runs.expected_groups())

    def urgency(self, group: Group) -> tuple[object, ...]:
        """Sort key of a group's next work: user priority, then fairness, then full priority."""
        work = self.waiting.peek(group)
        assert work is not None
        return work.priority[:1], self.shares.get_served_s(group.client), work.priority

    def peek(self, group: Group, device: str = "") -> Work | None:
        """The next work of `group` for a device model; it stays in the queue."""
        return self.waiting.peek(group, device)

    def n_rows(self, group: Group) -> float:
        """Rows of `group` that wait or that runs will submit."""
        return self.waiting.n_rows(group) + self.runs.expected_rows(group)

    def n_works(self, group: Group) -> int:
        """Pieces of work of `group` that wait or that runs could submit now."""
        return self.waiting.n_works(group) + self.runs.expected_units(group)

    def validate(self) -> None:
        """Raise AssertionError if the clients' counts disagree with the waiting work."""
        self.waiting.validate()
        for client in {work.group.client for work in self.waiting.works.values()}:
            n_works = sum(work.group.client == client for work in self.waiting.works.values())
            assert self.shares.n_waiting[client] == n_works, client
