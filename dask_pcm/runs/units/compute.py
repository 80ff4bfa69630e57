"""Computes the rows of a unit from its graph: as a whole, or batch by batch."""

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

#: Rows of the first chunk of a file that this process has not read from yet.
_PROBE_ROWS = 32


def chunks(unit: Unit, max_bytes: int) -> Iterator[Unit]:
    """Cut a unit into chunks of at most `max_bytes` in memory; 0 for no limit.

    Rows may take more memory than the file's footer says: dictionary encoding stores a repeated
    text once. So the ratio is measured as rows are read, beginning with a small chunk.
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
    """The rows of a unit, from its pickled graph and the inputs that it takes."""
    opened = _open(graph)
    given = {SPANS: unit.spans, **dict(zip(keys, inputs, strict=True))}
    return _evaluate(opened.tasks, opened.result, given)


class Batch(NamedTuple):
    """A range of input rows, and how to compute them."""

    start: int
    stop: int
    compute: Callable[[], pd.DataFrame]


def batches(unit: Unit, graph: bytes, max_bytes: int, end: Callable[[int], int]) -> Iterator[Batch]:
    """Cut a unit into batches; rows are read many batches at a time.

    `end` gives the end of the batch that begins with a row, at the latest. It is called when the
    batches before are computed, so it may depend on them.
    """
    opened = _open(graph)
    rest = dict(opened.tasks)  # execute_graph runs every task that it is given
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
    """Take adjacent rows up to `end` off the front of `spans`; return their first and end."""
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
