"""Lanes are a worker's threads for context tasks, in addition to its threads for plain tasks.

A worker starts ready tasks by priority while fewer are executing than it has threads. Lanes come on
top, and neither kind of task may occupy the other's places. So ready tasks wait in two queues, and
the worker's state gets a subclass that counts threads and lanes separately when it starts tasks.
Nothing else changes: ``nthreads`` stays as the user has set it.

Everything here runs on the worker's event loop.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Iterable, Iterator, MutableSet, Sequence

from distributed import Worker
from distributed.collections import HeapSet
from distributed.threadpoolexecutor import ThreadPoolExecutor
from distributed.worker_state_machine import RecsInstrs, TaskState, WorkerState

#: The executor in which context tasks run.
LANES = "pcm"
#: Interval between checks whether the last task has left a lane.
_LOOK_S = 0.5
_PRIORITY = operator.attrgetter("priority")


def is_on_lane(ts: TaskState) -> bool:
    """Whether a task runs on a lane."""
    return bool(ts.annotations) and ts.annotations.get("executor") == LANES


class Startable(MutableSet[TaskState]):
    """Replaces a ``HeapSet`` in a worker's state: tasks by priority, in two queues.

    It has the whole interface of a ``HeapSet``, over both queues together.

    Attributes
    ----------
    plain, on_lanes
        Tasks that wait for a thread, and for a lane.
    n_lanes
        How many tasks may be on lanes at the same time.
    """

    key = staticmethod(_PRIORITY)

    def __init__(self, tasks: Iterable[TaskState], n_lanes: int) -> None:
        self.n_lanes = n_lanes
        self.plain: HeapSet[TaskState] = HeapSet(key=_PRIORITY)
        self.on_lanes: HeapSet[TaskState] = HeapSet(key=_PRIORITY)
        for ts in tasks:
            self.add(ts)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} items>"

    def _filled(self) -> list[HeapSet[TaskState]]:
        """The queues that are not empty; raises KeyError as ``HeapSet`` does if both are."""
        if not self:
            raise KeyError("peek into empty set")
        return [queue for queue in (self.plain, self.on_lanes) if queue]

    def add(self, ts: TaskState) -> None:
        """Add a task to its queue."""
        (self.on_lanes if is_on_lane(ts) else self.plain).add(ts)

    def discard(self, ts: TaskState) -> None:
        """Remove a task, if it is here."""
        # From both: its annotations may have changed since it was added.
        self.plain.discard(ts)
        self.on_lanes.discard(ts)

    def clear(self) -> None:
        """Remove all tasks."""
        self.plain.clear()
        self.on_lanes.clear()

    def peek(self) -> TaskState:
        """The first by priority."""
        return min((queue.peek() for queue in self._filled()), key=_PRIORITY)

    def pop(self) -> TaskState:
        """Remove and return the first by priority."""
        return min(self._filled(), key=lambda queue: _PRIORITY(queue.peek())).pop()

    def peekn(self, n: int) -> Iterator[TaskState]:
        """The first `n` by priority."""
        return itertools.islice(self.sorted(), max(0, n))

    def peekright(self) -> TaskState:
        """One of the last by priority, not necessarily the very last."""
        return max((queue.peekright() for queue in self._filled()), key=_PRIORITY)

    def popright(self) -> TaskState:
        """Remove and return one of the last by priority."""
        return max(self._filled(), key=lambda queue: _PRIORITY(queue.peekright())).popright()

    def sorted(self) -> Iterator[TaskState]:
        """All of them by priority."""
        return heapq.merge(self.plain.sorted(), self.on_lanes.sorted(), key=_PRIORITY)

    def __contains__(self, ts: object) -> bool:
        return ts in self.plain or ts in self.on_lanes

    def __iter__(self) -> Iterator[TaskState]:
        yield from self.plain
        yield from self.on_lanes

    def __len__(self) -> int:
        return len(self.plain) + len(self.on_lanes)


class LanedState(WorkerState):
    """The state of a worker with lanes.

    It adds no slots, so that the class of an existing state can be changed to it and back.
    """

    __slots__ = ()

    def _ensure_computing(self) -> RecsInstrs:
        """Start ready tasks; as Dask's own method, with separate counts for threads and lanes."""
        if not self.running:
            return {}, []
        n_on_lanes = sum(map(is_on_lane, self.executing))
        n_plain = len(self.executing) - n_on_lanes
        recs: dict[TaskState, str] = {}
        while True:
            kinds = ["plain"] * (n_plain < self.nthreads)
            kinds += ["on_lanes"] * (n_on_lanes < self.ready.n_lanes)
            if (ts := self._pop_first(kinds)) is None:
                return recs, []
            recs[ts] = "executing"
            self._acquire_resources(ts)
            self.executing.add(ts)
            n_on_lanes += is_on_lane(ts)
            n_plain += not is_on_lane(ts)

    def _pop_first(self, kinds: Sequence[str]) -> TaskState | None:
        """Remove and return the first task of these kinds whose resources are available."""
        waiting = (self.ready, self.constrained)
        queues = [queue for kind in kinds for has in waiting if (queue := getattr(has, kind))]
        for queue in sorted(queues, key=lambda queue: _PRIORITY(queue.peek())):
            if self._resource_restrictions_satisfied(queue.peek()):
                return queue.pop()
        return None


def open_lanes(worker: Worker, n_lanes: int) -> None:
    """Give a worker lanes. A task that secedes frees its lane, as it would free a thread."""
    state = worker.state
    worker.executors[LANES] = ThreadPoolExecutor(n_lanes, thread_name_prefix="pcm-lane")
    state.ready = Startable(state.ready, n_lanes)
    state.constrained = Startable(state.constrained, n_lanes)
    state.__class__ = LanedState


def close_lanes(worker: Worker) -> None:
    """Undo ``open_lanes``; tasks that have not begun run on the worker's threads.

    A task on a lane stays there, and one that has seceded can rejoin its lane.
    """
    state = worker.state
    state.__class__ = WorkerState
    for name in ("ready", "constrained"):
        heap: HeapSet[TaskState] = HeapSet(key=_PRIORITY)
        for ts in getattr(state, name).sorted():
            heap.add(ts)
        setattr(state, name, heap)
    lanes = worker.executors.pop(LANES)
    worker.executors[LANES] = worker.executors["default"]  # queued tasks still name the executor
    on_lanes = {ts for ts in state.all_running_tasks if is_on_lane(ts)}
    worker.executors[f"{LANES}-{id(lanes)}"] = lanes  # shut down with the worker

    def end() -> None:
        if on_lanes & state.all_running_tasks:
            worker.loop.call_later(_LOOK_S, end)
        else:
            lanes.shutdown(wait=False)

    end()
