"""Tasks with few rows share calls of a function on their worker.

Dask has a task for each partition. If partitions have fewer rows than a batch, a call for each
costs more than its rows do. So while a task calls the function, others that come leave their rows
and their lane to it, and the next call has the rows of all that wait, up to a batch.

Only a task that is on its lane calls the function, which may be the user's and secede. Contexts are
held for one call at a time, so that other functions have their turns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakValueDictionary

import pandas as pd
from distributed import get_worker

from dask_pcm.frames.caller import Caller
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.plugins.worker.task import hand_over, hold, is_lane_wanted

#: Rows that wait for a call on a worker, in batches; with more, tasks stay on their lanes.
_N_BATCHES = 2
#: Seconds after which these look whether a task needs their lane that had left its own.
_POLL_S = 0.1


class _Told(Enum):
    """What a task is told that waits, instead of its result."""

    CALLS = "it calls the function next"
    ALONE = "it calls the function for itself"


@dataclass(slots=True, eq=False)
class _Waiting:
    """A task that waits for a call."""

    caller: Caller
    frame: pd.DataFrame
    has_lane: bool = True
    told: Future[Any] = field(default_factory=Future)


class SharedCalls:
    """The calls of one function on one worker; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._is_calling = False

    def results(self, caller: Caller, frame: pd.DataFrame) -> list[pd.DataFrame]:
        """The results of a task's rows, fewer than a batch; as those of ``Caller.results``."""
        mine = _Waiting(caller, frame)
        told = _Told.CALLS if self._is_first(mine) else self._wait(mine)
        if told is _Told.CALLS:
            told = self._call(mine)
        if told is _Told.ALONE:
            return caller.results(frame)
        return [caller.call.one_for_each(frame, told)]

    def _is_first(self, mine: _Waiting) -> bool:
        """Join those that wait; whether no task calls, so that this one does."""
        with self._lock:
            self._waiting.append(mine)
            is_first, self._is_calling = not self._is_calling, True
            n_rows = sum(len(one.frame) for one in self._waiting)
            batch_rows = mine.caller.call.batch_rows or 1
            mine.has_lane = is_first or n_rows > _N_BATCHES * batch_rows
        return is_first

    def _wait(self, mine: _Waiting) -> Any:
        """Wait for a result, or to be told what to do; without a lane if others need it."""
        while mine.has_lane and not wait([mine.told], _POLL_S).done:
            if is_lane_wanted():
                with self._lock:
                    mine.has_lane = mine.told.done()  # it may have been told to call just now
        if not mine.has_lane:
            hand_over(len(mine.frame))
        return mine.told.result()

    def _call(self, mine: _Waiting) -> Any:
        """Call the function for all that wait, until another task does; returns the own result."""
        taken: list[_Waiting] = []
        found: Any = None
        is_done = False
        try:
            while not is_done or not self._has_passed_on():
                with hold(mine.caller.refs, mine.caller.stats) as contexts:
                    taken = self._take()
                    answers = _answers(taken, contexts)
                for one, answer in zip(taken, answers, strict=True):
                    if one is mine:
                        found, is_done = answer, True
                    else:
                        _tell(one, answer)
        except BaseException as error:  # of the context or its device: each task has its own then
            self._give_up([one for one in taken if one is not mine])
            if not is_done or not isinstance(error, Exception):
                raise
        if isinstance(found, Exception):
            raise found
        return found

    def _take(self) -> list[_Waiting]:
        """The tasks of the next call, of a batch of rows and equal dtypes."""
        with self._lock:
            first = self._waiting.popleft()
            taken, left = [first], (first.caller.call.batch_rows or 1) - len(first.frame)
            dtypes = first.frame.dtypes
            while self._waiting and len(self._waiting[0].frame) <= left:
                if not self._waiting[0].frame.dtypes.equals(dtypes):
                    break
                taken.append(self._waiting.popleft())
                left -= len(taken[-1].frame)
        return taken

    def _has_passed_on(self) -> bool:
        """Have a task call that waits on its lane, if there is one; true without any that wait."""
        with self._lock:
            if not self._waiting:
                self._is_calling = False
                return True
            heir = next((one for one in self._waiting if one.has_lane), None)
            if heir is not None:
                heir.told.set_result(_Told.CALLS)
        return heir is not None

    def _give_up(self, taken: Sequence[_Waiting]) -> None:
        with self._lock:
            left = [*taken, *self._waiting]
            self._waiting.clear()
            self._is_calling = False
        for one in left:
            if not one.told.done():
                one.told.set_result(_Told.ALONE)


_lock = threading.Lock()
#: As long as tasks use them.
_shared: WeakValueDictionary[Hashable, SharedCalls] = WeakValueDictionary()


def shared_calls(caller: Caller) -> SharedCalls:
    """The calls of a task's function with the same contexts on its worker."""
    # Callers of equal functions have the same `Call`, see ``Sealed.open``, and keep it.
    key = get_worker().id, id(caller.call), tuple(ref.digest for ref in caller.refs)
    with _lock:
        return _shared.setdefault(key, SharedCalls())


def _tell(one: _Waiting, answer: Any) -> None:
    if isinstance(answer, Exception):
        one.told.set_exception(answer)
    else:
        one.told.set_result(answer)


def _answers(tasks: Sequence[_Waiting], contexts: Sequence[Any]) -> list[Any]:
    """The result of each task, or what it has failed with.

    If a call for several fails, halves of them are tried: the others' results must not depend on a
    task that fails.
    """
    first = tasks[0]
    try:
        if len(tasks) == 1:
            first.caller.tally.begin_batch()
            return [first.caller.batch(first.frame, contexts)]
        frame = _joined([one.frame for one in tasks])
        if frame is not None:
            call = first.caller.call
            return _parts(tasks, call.one_for_each(frame, call.on(frame, contexts)))
    except Exception as error:
        if is_sticky(error):
            raise
        if len(tasks) == 1:
            return [error]
    half = len(tasks) // 2
    return [*_answers(tasks[:half], contexts), *_answers(tasks[half:], contexts)]


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """The rows of frames with an index that repeats nothing; None if they cannot have one."""
    found = pd.concat(frames)
    if found.index.is_unique:
        return found
    # As files have it that were written without an index.
    if all(frame.index.equals(pd.RangeIndex(len(frame))) for frame in frames):
        return found.reset_index(drop=True)
    return None


def _parts(tasks: Sequence[_Waiting], result: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each task, on its index."""
    found, start = [], 0
    for one in tasks:
        one.caller.tally.begin_batch()
        one.caller.tally.succeed()
        stop = start + len(one.frame)
        # A copy: one that is kept would keep the rows of all.
        found.append(result.iloc[start:stop].set_axis(one.frame.index).copy())
        start = stop
    return found
