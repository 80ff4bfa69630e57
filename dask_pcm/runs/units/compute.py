"""Rows of a unit, computed from its graph: as a whole, or batch by batch."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import pandas as pd
from dask._task_spec import DataNode, execute_graph

from dask_pcm.parquet.cursors import inflation
from dask_pcm.parquet.pieces import Span
from dask_pcm.runs.plan import SPANS, Graph, Unit

#: So many rows are computed first in a process that has not read any yet.
_PROBE_ROWS = 32


def chunks(unit: Unit, max_bytes: int) -> Iterator[Unit]:
    """A unit in pieces that fit in memory: rows may take more there than a file's footer tells.

    A text that stands in every row is stored once. So what rows really take is measured as they
    are read; a unit that is not to be split has no such bound.
    """
    if max_bytes <= 0 or not unit.spans:
        yield unit
        return
    rest = list(unit.spans)
    while rest:
        taken: list[Span] = []
        n_bytes = 0.0
        while rest and n_bytes < max_bytes:
            span = rest.pop(0)
            known = inflation(span.path)
            row_bytes = max(1.0, span.row_bytes * (known or 1.0))
            n_rows = max(1, int((max_bytes - n_bytes) / row_bytes))
            if known is None:
                n_rows = min(n_rows, _PROBE_ROWS)
            if n_rows < span.n_rows:
                rest.insert(0, span.cut(n_rows, span.n_rows))
                span = span.cut(0, n_rows)
            taken.append(span)
            n_bytes += span.n_rows * row_bytes
            if known is None and rest and rest[0].path == span.path:
                break
        n_taken = sum(span.n_rows for span in taken)
        yield replace(unit, spans=tuple(taken), n_rows=n_taken)


def compute(
    unit: Unit, graph: bytes, keys: Sequence[Any] = (), inputs: Sequence[Any] = ()
) -> pd.DataFrame:
    """The rows of a unit, from its pickled graph and what it takes from outside."""
    opened = _open(graph)
    given = {SPANS: unit.spans, **dict(zip(keys, inputs, strict=True))}
    return _evaluate(opened.tasks, opened.result, given)


class Batch(NamedTuple):
    """Rows of the input that are computed at a time: which they are, and how to compute them."""

    start: int
    stop: int
    compute: Callable[[], pd.DataFrame]


def batches(unit: Unit, graph: bytes, max_bytes: int, end: Callable[[int], int]) -> Iterator[Batch]:
    """A unit by rows in batches; rows are read many at a time.

    Each batch ends at `end` of its first row at the latest; asked when those before are computed.
    """
    opened = _open(graph)
    rest = dict(opened.tasks)  # all of a graph is executed, whatever is asked of it
    read = {opened.leaf: rest.pop(opened.leaf)}
    for chunk in chunks(unit, max_bytes):
        spans = list(chunk.spans or ())
        rows = _evaluate(read, opened.leaf, {SPANS: chunk.spans})
        at = 0
        while spans:
            start, stop = _take(spans, end(spans[0].offset))
            given = {opened.leaf: rows.iloc[at : at + stop - start]}
            yield Batch(start, stop, partial(_evaluate, rest, opened.result, given))
            at += stop - start


def _take(spans: list[Span], end: int) -> tuple[int, int]:
    """Take the rows up to `end` off the front of `spans`, as far as they follow each other."""
    start = stop = spans[0].offset
    while spans and spans[0].offset == stop < end:
        span = spans.pop(0)
        n_taken = min(span.n_rows, end - stop)
        if n_taken < span.n_rows:
            spans.insert(0, span.cut(n_taken, span.n_rows))
        stop += n_taken
    return start, stop


def _evaluate(tasks: Mapping[Any, Any], result: Any, given: Mapping[Any, Any]) -> pd.DataFrame:
    if result in given:  # nothing but reading
        return cast(pd.DataFrame, given[result])
    nodes = {**tasks, **{key: DataNode(key, value) for key, value in given.items()}}
    return cast(pd.DataFrame, execute_graph(nodes, keys=[result])[result])


@lru_cache(maxsize=16)
def _open(graph: bytes) -> Graph:
    return cast(Graph, pickle.loads(graph))  # the same for every unit of a run by rows
