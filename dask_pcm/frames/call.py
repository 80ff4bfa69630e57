"""A task calls the user's function on one partition and checks the result against `meta`.

With ``batch_rows`` the function is called on one batch at a time. If a batch raises, it is
bisected until the failing rows are alone; their ``error`` column holds the exception, and the other
rows of the batch are unaffected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dask_pcm.context.context import ContextRef
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import PCMError, RowCountError, SchemaError
from dask_pcm.frames.failed_rows import ERROR, failed_row, with_error, without_categories
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.parquet.conversion import MISFITS, cast
from dask_pcm.plugins.worker.deadline import in_time
from dask_pcm.plugins.worker.first_batches import is_hopeless
from dask_pcm.plugins.worker.tally import Tally, unpack
from dask_pcm.plugins.worker.task import hold, task_stats
from dask_pcm.scheduling.rules.first_batches import N_BATCHES, Failing, Position


class _Withheld(threading.local):
    """Per thread: the error that replaces every row-wise call, or None to call as usual."""

    error: Exception | None = None


_withheld = _Withheld()


@contextmanager
def failing_all_rows(error: Exception) -> Iterator[None]:
    """Fail all rows with `error` instead of calling row-wise functions, on this thread only.

    For quarantined rows: no function may see them again, but their output has the same form as
    that of rows whose function raised.
    """
    _withheld.error = error
    try:
        yield
    finally:
        _withheld.error = None


class _Notes(threading.local):
    """Per thread: callbacks that observe the progress of the current rows, or None."""

    on_wait: Callable[[], None] | None = None
    on_call: Callable[[int, int, int], None] | None = None


_notes = _Notes()


@contextmanager
def noting(on_wait: Callable[[], None], on_call: Callable[[int, int, int], None]) -> Iterator[None]:
    """Report what row-wise functions are about to do, on this thread only.

    Parameters
    ----------
    on_wait
        Called before the task waits for its contexts. No row is computed until `on_call` follows.
    on_call
        Called as ``on_call(start, stop, n_rows)`` right before a function is called on rows
        ``start:stop`` of a frame of `n_rows` rows.
    """
    _notes.on_wait, _notes.on_call = on_wait, on_call
    try:
        yield
    finally:
        _notes.on_wait = _notes.on_call = None


@dataclass(frozen=True, slots=True)
class Call:
    """The user's function and how to call it.

    Attributes
    ----------
    func
        Called as ``func(frame, context, *args, **kwargs)``, or with contexts as keywords.
    names
        Keywords of the contexts, in the order of the refs; None for one positional context.
    batch_rows
        Rows per call; None to pass the whole partition.
    meta
        An empty frame with the columns and dtypes of the result.
    is_enforced
        Whether columns and dtypes of the result are checked against `meta`.
    timeout_s
        Limit of one call in seconds; None for none.
    """

    func: Callable[..., Any]
    names: tuple[str, ...] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch_rows: int | None
    meta: pd.DataFrame
    is_enforced: bool
    timeout_s: float | None = None

    def on(
        self, frame: pd.DataFrame, contexts: Sequence[Any], tally: Tally
    ) -> Iterator[pd.DataFrame]:
        """Apply the function to a partition, `batch_rows` rows at a time; yield each result."""
        if self.batch_rows is None:
            yield self._call(frame, contexts)
            return
        for start in range(0, len(frame), self.batch_rows):
            rows = frame.iloc[start : start + self.batch_rows]
            if _notes.on_call is not None and _withheld.error is None:
                _notes.on_call(start, start + len(rows), len(frame))
            tally.begin_batch()
            yield self._batch(rows, contexts, tally)

    def joined(self, parts: list[pd.DataFrame]) -> pd.DataFrame:
        """Concatenate the results of all batches and check them against `meta`."""
        if self.batch_rows is None:
            return self._enforced(parts[0])
        if any(not part.dtypes.equals(parts[0].dtypes) for part in parts[1:]):
            # Cast before concatenating: pandas would turn integers and nulls into rounded floats.
            parts = [self._enforced(with_error(part)) for part in parts]
        result = parts[0] if len(parts) == 1 else pd.concat(parts)
        return self._enforced(with_error(result))

    def _call(self, frame: pd.DataFrame, contexts: Sequence[Any]) -> Any:
        """Call the user's function once, within the time limit of a batch.

        Must run on the task's thread: the deadline and interrupts are tied to it.
        """
        # The function may modify its frame. A shallow copy isolates the original (pandas copies
        # on write): bisection passes the same rows again, and other tasks share a persisted
        # partition.
        frame = frame.copy(deep=False)
        limit = nullcontext() if self.batch_rows is None else in_time(self.timeout_s)
        try:
            with limit:
                if self.names is None:
                    return self.func(frame, *contexts, *self.args, **self.kwargs)
                named = dict(zip(self.names, contexts, strict=True))
                return self.func(frame, *self.args, **self.kwargs, **named)
        except BaseException as error:
            if (
                isinstance(error, Exception)
                or threading.current_thread() is threading.main_thread()
            ):
                raise  # on the main thread this may be the user's Ctrl-C
            # SystemExit and the like on a task's thread: Dask would end the worker or never
            # complete the task.
            raise RuntimeError(f"{_name(self.func)} raised {error!r}") from error

    def _batch(self, frame: pd.DataFrame, contexts: Sequence[Any], tally: Tally) -> pd.DataFrame:
        """Call the function on one batch; if it raises, bisect down to the failing rows."""
        if _withheld.error is not None:
            tally.succeed()
            rows = [frame.iloc[at : at + 1] for at in range(len(frame))]
            return pd.concat(
                [self._cast(failed_row(row, self.meta, _withheld.error)) for row in rows]
            )
        try:
            result = self._call(frame, contexts)
        except PCMError:
            raise
        except Exception as error:
            # A sticky device error fails every later call in this process; bisecting would blame
            # rows that are fine.
            if is_sticky(error):
                raise
            if len(frame) == 1:
                tally.fail(frame, error)
                return self._cast(failed_row(frame, self.meta, error))
        else:
            tally.succeed()
            return self._one_for_each(frame, result)
        # Outside the except block: errors of the halves must not be chained to this one.
        half = len(frame) // 2
        halves = (frame.iloc[:half], frame.iloc[half:])
        return pd.concat([self._batch(rows, contexts, tally) for rows in halves])

    def _one_for_each(self, frame: pd.DataFrame, result: Any) -> pd.DataFrame:
        """Check that `result` has one row per row of `frame`, in order; return it on its index.

        Raises
        ------
        RowCountError
            If it is no DataFrame, or has another number of rows or another index.
        SchemaError
            If its columns differ from `meta`.
        """
        name = _name(self.func)
        if not isinstance(result, pd.DataFrame):
            raise RowCountError(
                f"{name} returned {type(result).__name__}; expected a DataFrame with one row for"
                f" each of its {len(frame)} input rows."
            )
        if len(result) != len(frame):
            raise RowCountError(
                f"{name} got {len(frame)} rows and returned {len(result)}. With batch_rows it must"
                " return one row per input row, in order; omit batch_rows to filter or expand."
            )
        if not result.index.equals(frame.index):
            if not result.index.equals(pd.RangeIndex(len(result))):
                raise RowCountError(
                    f"{name} returned an index that differs from its input's, so the order of rows"
                    " is unknown. Keep the index, or reset it if the rows are in order."
                )
            result = result.set_axis(frame.index)
        if self.is_enforced:
            self._check_columns(result)
        return result

    def _enforced(self, result: Any) -> Any:
        """The result with the columns, their order and the dtypes of `meta`, if enforced."""
        if not self.is_enforced:
            return result
        if not isinstance(result, pd.DataFrame):
            raise SchemaError(
                f"{_name(self.func)} returned {type(result).__name__}; meta says a DataFrame with"
                f" columns {list(self.meta.columns)}."
            )
        self._check_columns(result)
        return self._cast(result[list(self.meta.columns)])

    def _check_columns(self, result: pd.DataFrame) -> None:
        """Raise SchemaError if columns are missing, repeated or not declared in `meta`."""
        if result.columns.equals(self.meta.columns):
            return
        if repeated := sorted({str(c) for c in result.columns[result.columns.duplicated()]}):
            raise SchemaError(
                f"{_name(self.func)} returned columns more than once: {', '.join(repeated)}."
            )
        optional = {ERROR} if self.batch_rows is not None else set()
        found = {*result.columns, *optional}
        missing = [name for name in self.meta.columns if name not in found]
        extra = [name for name in result.columns if name not in self.meta.columns]
        if missing or extra:
            difference = f"missing: {missing}" if missing else f"not declared: {extra}"
            raise SchemaError(
                f"{_name(self.func)} returned columns {list(result.columns)}, but meta says"
                f" {list(self.meta.columns)} ({difference})."
            )

    def _cast(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Cast columns to the dtypes of `meta`; raise SchemaError if a value would change."""
        different = {
            name: without_categories(dtype)
            for name, dtype in self.meta.dtypes.items()
            if without_categories(frame[name].dtype) != without_categories(dtype)
        }
        frame = frame.copy(deep=False)
        for name, dtype in different.items():
            try:
                frame[name] = cast(frame[name], dtype)
            except MISFITS as error:
                raise SchemaError(
                    f"{_name(self.func)} returned {name!r} as {frame[name].dtype}, which does not"
                    f" convert to the dtype in meta, {dtype}: {error}."
                ) from error
        return frame


def infer(
    frame: pd.DataFrame,
    call: Sealed,
    refs: tuple[ContextRef, ...],
    position: Position | None = None,
) -> pd.DataFrame:
    """Run one task: acquire the contexts and call the function on `frame`.

    An empty partition acquires no context and calls nothing.

    Parameters
    ----------
    frame
        The rows of one partition.
    call
        The pickled ``Call``.
    refs
        The contexts to acquire, in the order of ``Call.names``.
    position
        Which partition of which Dask collection this is; None in a run, whose driver checks
        failures itself.

    Raises
    ------
    Exception
        The function's own exception, if it failed on all of the first rows of the collection.
    """
    opened: Call = call.open()
    is_by_rows = opened.batch_rows is not None
    if is_by_rows:
        task_stats.is_by_rows, task_stats.errors = True, []
    if not len(frame):
        if is_by_rows and position is not None:
            # Record that this partition has no rows, so the check moves on to the next one.
            is_hopeless(position, Failing(0))
        return opened.meta.copy()
    tally = Tally()
    if is_by_rows and position is None:
        tally = task_stats.tallies.setdefault(call.digest, tally)
    parts = []
    if _notes.on_wait is not None:
        _notes.on_wait()
    with hold(refs) as contexts:
        for part in opened.on(frame, contexts, tally):
            parts.append(part)
            if position is not None and len(parts) == N_BATCHES:
                _check_hope(position, tally)
    # After the contexts are released: the check may wait, and another lane can use them meanwhile.
    if is_by_rows and position is not None and len(parts) < N_BATCHES:
        _check_hope(position, tally)
    result = opened.joined(parts)
    if is_by_rows and ERROR in result.columns:
        task_stats.errors = result[ERROR].dropna().tolist()
    return result


def _check_hope(position: Position, tally: Tally) -> None:
    """Raise the function's own exception if all of the collection's first rows failed with it."""
    failing = tally.failing
    if failing is not None and failing.n_batches and is_hopeless(position, failing):
        error = unpack(tally.error)
        error.add_note(
            "It ends the computation, because all of the first rows failed with it. If only these"
            " rows are bad, catch the exception in the function and return its text in the"
            f" column {ERROR!r}."
        )
        raise error


def _name(func: Any) -> str:
    """The name of a callable in messages."""
    return getattr(func, "__qualname__", None) or type(func).__qualname__
