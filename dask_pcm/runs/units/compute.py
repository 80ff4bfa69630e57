"""Computes the rows of a unit from its graph: as a whole, or batch by batch."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import pandas as pd

from dask_pcm.frames.call import Call
from dask_pcm.frames.caller import Caller, Submission, Watch
from dask_pcm.frames.failed_rows import ERROR
from dask_pcm.parquet.cursors import inflation
from dask_pcm.parquet.reader import Span
from dask_pcm.plugins.worker.stats import TaskStats
from dask_pcm.runs.units.graph import SPANS, Graph, Unit

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


@dataclass(frozen=True, slots=True)
class Batch:
    """A range of input rows, and the frames from which it is computed.

    Attributes
    ----------
    start, stop
        The rows, counted over the whole input.
    values
        The frames that are there already, by key of the graph.
    is_ready
        Whether the frame that the first function is called on is among them.
    """

    start: int
    stop: int
    values: dict[Any, pd.DataFrame]
    is_ready: bool = False


class Outcome(NamedTuple):
    """The rows of a batch or a unit.

    Attributes
    ----------
    errors
        What some of them failed with.
    call
        The function that has just returned them, if their columns are not cast to its dtypes yet.
    """

    frames: list[pd.DataFrame]
    errors: list[str]
    call: Call | None = None


class Computation:
    """Computes rows of a unit from its graph; for one task, on its thread.

    Functions with contexts are called between the other tasks of the graph, not by Dask: so a task
    sees what they do, and several batches may be in flight.

    Parameters
    ----------
    graph
        A pickled ``Graph``.
    stats
        Collects what the task does.
    inputs
        Frames that others have computed, by key of the graph.
    """

    def __init__(
        self, graph: bytes, stats: TaskStats, inputs: Mapping[Any, Any] | None = None
    ) -> None:
        self.stats = stats
        self._graph = _open(graph)
        self._inputs = inputs or {}
        self._callers = [(step, Caller(step.call, step.refs, stats)) for step in self._graph.steps]

    @property
    def is_by_rows(self) -> bool:
        """Whether a function is called by rows; only its failed rows count as such."""
        return any(caller.call.batch_rows is not None for _, caller in self._callers)

    @property
    def is_attended(self) -> bool:
        """Whether attendants serve the batches in flight, so that the gate knows their limit."""
        return bool(self._callers) and self._callers[-1][1].is_attended

    @property
    def has_drafts(self) -> bool:
        """Whether rows in flight leave drafts; see ``Call.has_drafts``."""
        return bool(self._callers) and self._callers[-1][1].call.has_drafts

    def resume(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Have batches go on from drafts of an earlier attempt."""
        if self._callers:
            self._callers[-1][1].resume(drafts)

    def drafts(self) -> dict[int, list[int]]:
        """Drafts of the batches in flight."""
        return self._callers[-1][1].drafts()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until a batch is accepted at once; False if that takes longer."""
        return not self._callers or self._callers[-1][1].wait_for_room(timeout_s)

    @property
    def timeout_s(self) -> float | None:
        """The limit of a batch of the last function, in seconds; None if it has none of its own."""
        return self._callers[-1][1].call.timeout_s if self._callers else None

    def close(self, *raised: Any) -> None:
        """Let go of contexts that batches in flight use; `raised` as for ``__exit__``."""
        for _, caller in self._callers:
            caller.close(*raised)

    def whole(self, unit: Unit) -> Outcome:
        """All rows of a unit, or of the partition that it is."""
        values = {SPANS: unit.spans, **self._inputs}
        parts: list[pd.DataFrame] = []
        for step, caller in self._callers:
            parts = caller.results(self._graph.evaluate(step.below, values))
            values[step.key] = caller.call.joined(parts)
        return self._outcome([self._graph.evaluate(self._graph.result, values)], parts)

    def batches(
        self, unit: Unit, max_bytes: int, end: Callable[[int], int], is_ahead: bool
    ) -> Iterator[Batch]:
        """Cut a unit into batches; rows are read many batches at a time.

        Parameters
        ----------
        end
            Gives the end of the batch that begins with a row, at the latest. It is called when the
            batches before are begun, so it may depend on them.
        is_ahead
            Whether what lies below the first function is computed for many batches at a time, too.
        """
        for chunk in chunks(unit, max_bytes):
            spans = list(chunk.spans or ())
            whole = self._read(chunk, is_ahead)
            is_ready = bool(self._callers) and self._callers[0][0].below in whole
            at = 0
            while spans:
                start, stop = _take(spans, end(spans[0].offset))
                until = at + stop - start
                values = {key: frame.iloc[at:until] for key, frame in whole.items()}
                yield Batch(start, stop, values, is_ready)
                at = until

    def _read(self, chunk: Unit, is_ahead: bool) -> dict[Any, pd.DataFrame]:
        """The rows of a chunk, and what the first function is called on, where both are in line."""
        leaf = self._graph.leaf
        rows = self._graph.evaluate(leaf, {SPANS: chunk.spans})
        found = {leaf: rows}
        if is_ahead and self._callers and self._callers[0][0].below != leaf:
            below = self._callers[0][0].below
            frame = self._graph.evaluate(below, found)
            if len(frame) == len(rows):  # no filter has removed any
                found[below] = frame
        return found

    def submit(self, batch: Batch, watch: Watch, is_alone: bool = False) -> Submission[Outcome]:
        """Begin a batch; its result is an ``Outcome``. Only the last function may be served.

        Parameters
        ----------
        is_alone
            Whether nothing else of its contexts is computed meanwhile, where they have attendants.
        """
        values = dict(batch.values)
        if not self._callers:
            frame = self._graph.evaluate(self._graph.result, values)
            return Submission(lambda: Outcome([frame], []))
        *before, (last, caller) = self._callers
        earlier: list[pd.DataFrame] = []
        for step, other in before:
            parts = other.results(self._graph.evaluate(step.below, values), watch)
            values[step.key] = other.call.joined(parts)
            if other.call.batch_rows is not None:
                earlier.append(values[step.key])
        frame = self._graph.evaluate(last.below, values)
        if not caller.call.is_served or not len(frame):
            found = _with_errors(caller.results(frame, watch), earlier)
            return Submission(lambda: self._finished(values, found))
        begun = caller.submit(frame, watch, is_alone)
        finish = lambda: self._finished(values, _with_errors(begun.result(), earlier))  # noqa: E731
        return Submission(finish, begun.future)

    def failed(self, batch: Batch, error: Exception) -> Outcome:
        """The rows of a batch if all of them fail with `error`, and no function is called."""
        values, parts = dict(batch.values), []
        for step, caller in self._callers:
            parts = caller.failed(self._graph.evaluate(step.below, values), error)
            values[step.key] = caller.call.joined(parts)
        return self._outcome([self._graph.evaluate(self._graph.result, values)], parts)

    def _finished(self, values: dict[Any, Any], parts: list[pd.DataFrame]) -> Outcome:
        """The rows of a batch from the results of the last function."""
        last, caller = self._callers[-1]
        if self._graph.result == last.key:
            return self._outcome(parts, parts)._replace(call=caller.call)
        values[last.key] = caller.call.joined(parts)
        return self._outcome([self._graph.evaluate(self._graph.result, values)], parts)

    def _outcome(self, frames: list[pd.DataFrame], parts: list[pd.DataFrame]) -> Outcome:
        """Frames with their errors; if the frames lack that column, with those of `parts`."""
        if not self.is_by_rows:
            return Outcome(frames, [])
        found = frames if any(ERROR in frame.columns for frame in frames) else parts
        errors = [
            error
            for frame in found
            if ERROR in frame.columns
            for error in frame[ERROR].dropna().tolist()
        ]
        return Outcome(frames, errors)


def _with_errors(parts: list[pd.DataFrame], earlier: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Results of the last function, with the errors of rows that an earlier one has failed on.

    A function that does not pass the column on would have them end without answer and error.
    """
    for frame in reversed(earlier):
        failed = frame[ERROR][frame[ERROR].notna()]
        if failed.empty or not all(part.index.is_unique for part in parts):
            continue
        found = []
        for part in parts:
            own = part[ERROR] if ERROR in part.columns else pd.Series(index=part.index, dtype="str")
            lost = failed[failed.index.isin(part.index) & ~failed.index.duplicated()]
            lost = lost[own.reindex(lost.index).isna().to_numpy()]
            if len(lost):
                own = own.astype(object)
                own.loc[lost.index] = lost
                part = part.assign(**{ERROR: own.astype("str")})
            found.append(part)
        parts = found
    return parts


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


@lru_cache(maxsize=16)
def _open(graph: bytes) -> Graph:
    return cast(Graph, pickle.loads(graph))  # the same for every unit of a run by rows
