"""The walk over a task's arguments."""

from __future__ import annotations

import functools
import time

from dask_pcm.plugins.scheduler.tasks.find_refs import find_refs
from tests.support.gate_tasks import (
    A,
    B,
    numbers,
)


def test_the_walk_finds_refs_and_is_bounded():
    from dask._task_spec import DataNode, Task, TaskRef

    ref = A.ref

    def found(*args, **kwargs):
        return [x.digest for x in find_refs(Task("k", numbers, *args, **kwargs))]

    assert found(1, ctx=A) == found(ref) == found([1, {"x": (ref,)}]) == [A.digest]
    assert [x.digest for x in find_refs(Task("k", functools.partial(numbers, ctx=A)))] == [A.digest]
    assert found(A, B) == sorted([A.digest, B.digest])
    assert found(1, TaskRef("x")) == []
    assert find_refs(DataNode("k", ref)) == ()
    start = time.thread_time()
    assert found(list(range(10**6))) == []
    assert time.thread_time() - start < 0.1  # all of them would take longer
