"""Lanes of a worker: threads for context tasks, beside those that it has for plain ones.

A worker starts ready tasks in the order of their priorities for as long as fewer are executing than
it has threads. Lanes come on top of these, and two kinds of tasks must not take each other's: so
what is ready waits in two queues, and only what has a thread or a lane of its own is shown.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, MutableSet

from distributed import Worker
from distributed.collections import HeapSet
from distributed.threadpoolexecutor import ThreadPoolExecutor
from distributed.worker_state_machine import TaskState, WorkerState

#: The executor in which context tasks run.
LANES = "pcm"
_LOOK_S = 0.5


def is_on_lane(ts: TaskState) -> bool:
    """Whether a task runs on a lane."""
    return bool(ts.annotations) and ts.annotations.get("executor") == LANES


class Startable(MutableSet[TaskState]):
    """Stands in for a ``HeapSet`` of a worker's state: ready tasks by priority, in two queues.

    All are in it, but it is true, and shows a first one, only where that one could start.
    """

    def __init__(self, state: WorkerState, n_threads: int, n_lanes: int) -> None:
        self._state = state
        self._n_threads, self._n_lanes = n_threads, n_lanes
        self._plain: HeapSet[TaskState] = _heap()
        self._on_lanes: HeapSet[TaskState] = _heap()

    def _queue(self, ts: TaskState) -> HeapSet[TaskState]:
        return self._on_lanes if is_on_lane(ts) else self._plain

    def _first(self) -> HeapSet[TaskState] | None:
        """The queue of the first task that could start; None if none could."""
        executing = self._state.executing
        n_on_lanes = sum(map(is_on_lane, executing))
        n_plain = len(executing) - n_on_lanes
        queues = []
        if self._plain and n_plain < self._n_threads:
            queues.append(self._plain)
        if self._on_lanes and n_on_lanes < self._n_lanes:
            queues.append(self._on_lanes)
        return min(queues, key=lambda queue: queue.peek().priority or (), default=None)

    def __bool__(self) -> bool:
        return self._first() is not None

    def peek(self) -> TaskState:
        """The first that could start."""
        queue = self._first()
        if queue is None:
            raise KeyError("nothing that could start")
        return queue.peek()

    def pop(self) -> TaskState:
        """Take out the first that could start."""
        ts = self.peek()
        self.discard(ts)
        return ts

    def add(self, ts: TaskState) -> None:
        self._queue(ts).add(ts)

    def discard(self, ts: TaskState) -> None:
        for queue in (self._plain, self._on_lanes):
            queue.discard(ts)

    def __contains__(self, ts: object) -> bool:
        return ts in self._plain or ts in self._on_lanes

    def __iter__(self) -> Iterator[TaskState]:
        yield from self._plain
        yield from self._on_lanes

    def __len__(self) -> int:
        return len(self._plain) + len(self._on_lanes)

    def sorted(self) -> Iterator[TaskState]:
        """All of them by priority."""
        return iter(sorted(self, key=operator.attrgetter("priority")))


def open_lanes(worker: Worker, n_lanes: int) -> None:
    """Give a worker lanes; a task that secedes leaves its own to the next, as on other threads."""
    state = worker.state
    worker.executors[LANES] = ThreadPoolExecutor(n_lanes, thread_name_prefix="pcm-lane")
    n_threads = state.nthreads
    for name in ("ready", "constrained"):
        queue = Startable(state, n_threads, n_lanes)
        for ts in getattr(state, name).sorted():
            queue.add(ts)
        setattr(state, name, queue)
    state.nthreads += n_lanes


def close_lanes(worker: Worker, n_lanes: int) -> None:
    """Undo it; what is still on its way runs on the worker's threads.

    What is on a lane stays there; one that has seceded comes back to it at its end.
    """
    state = worker.state
    for name in ("ready", "constrained"):
        heap = _heap()
        for ts in getattr(state, name).sorted():
            heap.add(ts)
        setattr(state, name, heap)
    state.nthreads -= n_lanes
    lanes = worker.executors.pop(LANES)
    worker.executors[LANES] = worker.executors["default"]
    on_lanes = {ts for ts in state.all_running_tasks if is_on_lane(ts)}
    worker.executors[f"{LANES}-{id(lanes)}"] = lanes  # a worker that closes shuts it down

    def end() -> None:
        if on_lanes & state.all_running_tasks:
            worker.loop.call_later(_LOOK_S, end)
        else:
            lanes.shutdown(wait=False)

    end()


def _heap() -> HeapSet[TaskState]:
    return HeapSet(key=operator.attrgetter("priority"))
