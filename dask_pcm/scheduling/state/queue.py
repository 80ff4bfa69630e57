"""Work that waits at the gate, ordered by priority and then by arrival."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from dask_pcm.scheduling.events import Group, Work

#: (priority, order of arrival, key). Entries are removed lazily: an entry whose key has left the
#: queue, or has moved to another group, is stale and skipped.
_Entry: TypeAlias = tuple[tuple[float, ...], int, object]


@dataclass(slots=True)
class GroupQueue:
    """Waiting work of one group: a heap for each device model that pieces were cut for."""

    heaps: dict[str, list[_Entry]] = field(default_factory=dict)
    n_rows: float = 0.0
    n_works: int = 0


@dataclass(slots=True)
class WorkQueue:
    """All waiting work, indexed by group, by key and by context."""

    works: dict[object, Work] = field(default_factory=dict)
    queues: dict[Group, GroupQueue] = field(default_factory=dict)
    #: Groups with waiting work, by each context that they need.
    by_context: dict[str, dict[Group, None]] = field(default_factory=dict)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        return len(self.works)

    def __contains__(self, key: object) -> bool:
        return key in self.works

    def add(self, work: Work) -> bool:
        """Add work, replacing work of the same key; return whether it is the first of its group."""
        self.remove(work.key)
        self.works[work.key] = work
        queue = self.queues.get(work.group)
        is_first = queue is None
        if queue is None:
            queue = self.queues[work.group] = GroupQueue()
            for context in work.group.contexts:
                self.by_context.setdefault(context, {})[work.group] = None
        heap = queue.heaps.setdefault(work.cut_for, [])
        heapq.heappush(heap, (work.priority, next(self._order), work.key))
        queue.n_rows += work.n_rows
        queue.n_works += 1
        return is_first

    def remove(self, key: object) -> Work | None:
        """Remove and return the work of a key; None if it does not wait."""
        work = self.works.pop(key, None)
        if work is None:
            return None
        queue = self.queues[work.group]
        queue.n_rows -= work.n_rows
        queue.n_works -= 1
        if not queue.n_works:
            del self.queues[work.group]
            for context in dict.fromkeys(work.group.contexts):
                groups = self.by_context[context]
                groups.pop(work.group, None)
                if not groups:
                    del self.by_context[context]
        return work

    def peek(self, group: Group, device: str = "") -> Work | None:
        """The next work of a group for a device model; it stays in the queue.

        Work cut for this device precedes work cut for any, and that precedes work cut for another.
        The user's own priority, the first number of `priority`, precedes all of these.
        """
        queue = self.queues.get(group)
        if queue is None:
            return None
        best: Work | None = None
        best_rank: tuple[object, ...] = ()
        for cut_for in list(queue.heaps):
            work = self._head(queue, group, cut_for)
            if work is None:
                continue
            if len(queue.heaps) == 1:
                return work
            # Of work cut for another device, take the smallest piece: if this device is slower,
            # a large piece would delay the end.
            fit = 0 if cut_for == device else 1 + bool(cut_for)
            rank = (work.priority[:1], fit, work.n_rows if fit == 2 else 0.0, work.priority)
            if best is None or rank < best_rank:
                best, best_rank = work, rank
        return best

    def _head(self, queue: GroupQueue, group: Group, cut_for: str) -> Work | None:
        """The first live entry of a heap; drops stale entries, and the heap once it is empty."""
        heap = queue.heaps[cut_for]
        while heap:
            work = self.works.get(heap[0][2])
            if work is not None and work.group == group and work.cut_for == cut_for:
                return work
            heapq.heappop(heap)
        del queue.heaps[cut_for]
        return None

    def keys(self, group: Group) -> list[object]:
        """Keys of a group's waiting work, the next one first."""
        queue = self.queues.get(group)
        if queue is None:
            return []
        queued = sorted(entry for heap in queue.heaps.values() for entry in heap)
        works = ((key, self.works.get(key)) for key in dict.fromkeys(key for *_, key in queued))
        return [key for key, work in works if work is not None and work.group == group]

    def n_rows(self, group: Group) -> float:
        """Rows of a group that wait."""
        queue = self.queues.get(group)
        return queue.n_rows if queue else 0.0

    def n_works(self, group: Group) -> int:
        """Pieces of work of a group that wait."""
        queue = self.queues.get(group)
        return queue.n_works if queue else 0

    def validate(self) -> None:
        """Raise AssertionError if the indexes disagree with the waiting work."""
        for group, queue in self.queues.items():
            works = [work for work in self.works.values() if work.group == group]
            assert queue.n_works == len(works) > 0, group
            assert abs(queue.n_rows - sum(work.n_rows for work in works)) < 1e-6, group
            assert set(self.keys(group)) == {work.key for work in works}, group
            for context in group.contexts:
                assert group in self.by_context[context], (group, context)
        assert {work.group for work in self.works.values()} == self.queues.keys()
