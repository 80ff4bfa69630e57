"""Which contexts a task needs: found by walking its arguments."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable
from typing import Any

from dask._task_spec import DataNode, GraphNode, Task

from dask_pcm.context.context import Context, ContextRef

#: Objects looked at in one task. Beyond it the task counts as seen to its end: a list of a
#: million elements must not hold up the scheduler's event loop.
MAX_VISITS = 2_000


def find_refs(run_spec: Any, inputs: Iterable[Any] = ()) -> tuple[ContextRef, ...]:
    """Return the refs that a task's specification carries, each digest once, in digest order.

    A bare ``DataNode`` is data, not a task that uses it: nothing is found in one. But it is looked
    into where it is among the `inputs` of a task, as in ``delayed(func)(delayed(context))``.
    """
    if not isinstance(run_spec, GraphNode) or isinstance(run_spec, DataNode):
        return ()
    found: dict[str, ContextRef] = {}
    # Near things first: a long list beside a context must not hide it.
    todo = deque([run_spec, *(node for node in inputs if isinstance(node, DataNode))])
    for _ in range(MAX_VISITS):
        if not todo:
            break
        item = todo.popleft()
        if isinstance(item, ContextRef):
            found[item.digest] = item
        elif isinstance(item, Context):
            found[item.digest] = item.ref
        elif not isinstance(item, (str, bytes, int, float)):
            todo.extend(_inside(item))
    return tuple(found[digest] for digest in sorted(found))


def _inside(item: Any) -> Iterable[Any]:
    if isinstance(item, Task):
        return (item.func, *item.args, *item.kwargs.values())
    if isinstance(item, functools.partial):
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, DataNode):
        return (item.value,)
    if isinstance(item, dict):
        return item.values() if len(item) <= MAX_VISITS else ()
    if isinstance(item, (list, tuple, set, frozenset)):
        return item if len(item) <= MAX_VISITS else ()
    return ()
