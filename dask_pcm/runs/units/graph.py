"""What a unit is, and the graph that computes it; on workers, without Dask's frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dask._task_spec import DataNode, Task, execute_graph

from dask_pcm.context.context import ContextRef
from dask_pcm.context.sealed import Sealed
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.parquet.reader import Span

#: The key of the rows to read, in the graph of a unit.
SPANS = "pcm-spans"


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that are computed by one task and committed as one part.

    Attributes
    ----------
    name
        File name of its part.
    partition
        Partition of the frame whose graph computes it.
    spans
        Rows to read instead of that partition's own; None for the partition as it is.
    n_rows
        Rows of input; None where unknown.
    retry
        Numbers of the rows within a committed part that are computed again; empty for all. None for
        a unit that is computed for the first time.
    number
        Index among the units that are computed for the first time, in input order.
    """

    name: str
    partition: int
    spans: tuple[Span, ...] | None
    n_rows: int | None
    retry: tuple[int, ...] | None = None
    number: int = 0


class Step(NamedTuple):
    """One function with contexts within the graph of a unit.

    Attributes
    ----------
    key, below
        The keys of its result, and of the frame that it is called on.
    """

    key: Any
    below: Any
    call: Sealed
    refs: tuple[ContextRef, ...]


class Graph(NamedTuple):
    """Tasks that compute a unit, by key.

    Attributes
    ----------
    steps
        The functions with contexts, each after those whose results it needs.
    result
        The key of its rows.
    leaf
        The key of its input rows; None where another reader than ours reads them.
    """

    tasks: dict[Any, Task]
    steps: tuple[Step, ...]
    result: Any
    leaf: Any

    def evaluate(self, key: Any, values: Mapping[Any, Any]) -> Any:
        """The value of a key, from those that are there; only what it needs is computed."""
        if key in values:
            return values[key]
        nodes: dict[Any, Any] = {}
        todo = [key]
        while todo:  # execute_graph runs every task that it is given
            one = todo.pop()
            if one in nodes:
                continue
            if one in values:
                nodes[one] = DataNode(one, values[one])
            else:
                nodes[one] = self.tasks[one]
                todo += nodes[one].dependencies
        return execute_graph(nodes, keys=[key])[key]


def cut_to(span: Span, done: Ranges) -> list[Span]:
    """The parts of a span that are not done."""
    first = span.offset
    missing = done.missing(first, first + span.n_rows)
    return [span.cut(start - first, stop - first) for start, stop in missing]
