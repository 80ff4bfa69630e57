"""A task needs the contexts among its arguments, which a bounded breadth-first walk finds."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable
from typing import Any

from dask._task_spec import DataNode, GraphNode, Task

from dask_pcm.context.context import Context, ContextRef

#: Objects visited per task; the rest is ignored. A list of a million elements must not block the
#: scheduler's event loop.
MAX_VISITS = 2_000


def find_refs(run_spec: Any, inputs: Iterable[Any] = ()) -> tuple[ContextRef, ...]:
    """Return the refs in a task's specification, each digest once, in digest order.

    A bare ``DataNode`` is data and uses no context, so nothing is found in it. It is searched if it
    is among the `inputs` of a task, as in ``delayed(func)(delayed(context))``.
    """
    if not isinstance(run_spec, GraphNode) or isinstance(run_spec, DataNode):
        return ()
    found: dict[str, ContextRef] = {}
    # Breadth first: a long list beside a context must not hide it.
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
    """What to visit in an item; nothing in a container that is longer than the whole walk."""
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
