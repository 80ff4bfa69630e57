"""A task calls the user's function on one partition and checks the result against `meta`.

With ``batch_rows`` the function is called on one batch at a time. If a batch raises, it is
bisected until the failing rows are alone; their ``error`` column holds the exception, and the other
rows of the batch are unaffected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import pandas as pd

from dask_pcm.context.context import ContextRef
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import PCMError, RowCountError, SchemaError
from dask_pcm.frames.failed_rows import ERROR, failed_row, with_error, without_categories
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.parquet.conversion import MISFITS, cast
from dask_pcm.plugins.worker.deadline import in_time
from dask_pcm.plugins.worker.first_batches import is_hopeless
from dask_pcm.plugins.worker.stats import TaskStats
from dask_pcm.plugins.worker.tally import Tally, unpack
from dask_pcm.plugins.worker.task import attendants, hold
from dask_pcm.scheduling.rules.first_batches import N_BATCHES, Failing, Position

T = TypeVar("T")


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
    #: Of `meta`: looked up for every batch.
    _names: list[Any] = field(init=False, repr=False, compare=False)
    _dtypes: dict[Any, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", self.meta.columns.tolist())
        object.__setattr__(self, "_dtypes", dict(self.meta.dtypes.items()))

    @property
    def is_served(self) -> bool:
        """Whether several batches may be in flight: the function has a method ``submit``.

        It is called like the function and returns a future. For a context with an attendant it gets
        the attendant instead of the live object; see ``ladder/residency.py``.
        """
        return self.batch_rows is not None and callable(getattr(self.func, "submit", None))

    def on(self, frame: pd.DataFrame, contexts: Sequence[Any]) -> Any:
        """Call the user's function once, within the time limit of a batch.

        Must run on the task's thread: the deadline and interrupts are tied to it.
        """
        # The function may modify its frame. A shallow copy isolates the original (pandas copies
        # on write): bisection passes the same rows again, and other tasks share a persisted
        # partition.
        frame = frame.copy(deep=False)
        limit = nullcontext() if self.batch_rows is None else in_time(self.timeout_s)
        with self._raising(), limit:
            if self.is_served:
                return self.submit(frame, contexts).result()
            args, kwargs = self._arguments(contexts)
            return self.func(frame, *args, **kwargs)

    def submit(self, frame: pd.DataFrame, contexts: Sequence[Any]) -> Future[pd.DataFrame]:
        """Hand a batch to a function that is served; it gets attendants instead of live objects."""
        args, kwargs = self._arguments(contexts)
        with self._raising():
            submitted: Future[pd.DataFrame] = self.func.submit(frame, *args, **kwargs)  # type: ignore[attr-defined] # it is served
        return submitted

    def _arguments(self, contexts: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the function is called with after its frame."""
        if self.names is None:
            return (*contexts, *self.args), dict(self.kwargs)
        return self.args, {**self.kwargs, **dict(zip(self.names, contexts, strict=True))}

    @contextmanager
    def _raising(self) -> Iterator[None]:
        """Turn SystemExit and the like into errors of the function."""
        try:
            yield
        except BaseException as error:
            if (
                isinstance(error, Exception)
                or threading.current_thread() is threading.main_thread()
            ):
                raise  # on the main thread this may be the user's Ctrl-C
            # On a task's thread, Dask would end the worker or never complete the task.
            raise RuntimeError(f"{_name(self.func)} raised {error!r}") from error

    def joined(self, parts: list[pd.DataFrame]) -> pd.DataFrame:
        """Concatenate the results of all batches and check them against `meta`."""
        if self.batch_rows is None:
            return self.enforced(parts[0])
        if any(not part.dtypes.equals(parts[0].dtypes) for part in parts[1:]):
            # Cast before concatenating: pandas would turn integers and nulls into rounded floats.
            parts = [self.enforced(with_error(part)) for part in parts]
        result = parts[0] if len(parts) == 1 else pd.concat(parts)
        return self.enforced(with_error(result))

    def one_for_each(self, frame: pd.DataFrame, result: Any) -> pd.DataFrame:
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

    def enforced(self, result: Any) -> Any:
        """The result with the columns, their order and the dtypes of `meta`, if enforced.

        An ``error`` column that the function did not return is not added.
        """
        if not self.is_enforced:
            return result
        if not isinstance(result, pd.DataFrame):
            raise SchemaError(
                f"{_name(self.func)} returned {type(result).__name__}; meta says a DataFrame with"
                f" columns {list(self.meta.columns)}."
            )
        self._check_columns(result)
        names = [name for name in self.meta.columns if name in result.columns]
        if names != list(result.columns):
            result = result[names]
        return self.cast(result)

    def _check_columns(self, result: pd.DataFrame) -> None:
        """Raise SchemaError if columns are missing, repeated or not declared in `meta`."""
        names = result.columns.tolist()
        if names == self._names or (self.batch_rows is not None and [*names, ERROR] == self._names):
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

    def cast(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Cast columns to the dtypes of `meta`; raise SchemaError if a value would change."""
        dtypes = frame.dtypes.items()
        different = [name for name, dtype in dtypes if not self._is_right(name, dtype)]
        if not different:
            return frame
        frame = frame.copy(deep=False)
        for name in different:
            frame[name] = self.cast_column(frame[name])
        return frame

    def cast_column(self, column: pd.Series) -> pd.Series:
        """Cast one column, by its name, to its dtype in `meta`."""
        name = column.name
        if not self.is_enforced or self._is_right(name, column.dtype):
            return column
        try:
            return cast(column, self._dtypes[name])
        except MISFITS as error:
            raise SchemaError(
                f"{_name(self.func)} returned {name!r} as {column.dtype}, which does not convert to"
                f" the dtype in meta, {self._dtypes[name]}: {error}."
            ) from error

    def _is_right(self, name: Any, dtype: Any) -> bool:
        """Whether a column's dtype is that in `meta`; categories may differ."""
        wanted = self._dtypes[name]
        return bool(dtype == wanted or without_categories(dtype) == without_categories(wanted))


class Watch(Protocol):
    """Sees what is about to happen to the rows of a frame."""

    def waits(self) -> None:
        """The task waits for its contexts. No row is computed until `calls` follows."""

    def calls(self, start: int, stop: int, n_rows: int) -> None:
        """The function is about to be called on rows ``start:stop`` of a frame of `n_rows`."""


@dataclass(frozen=True, slots=True)
class Submission(Generic[T]):
    """A batch that was begun.

    Attributes
    ----------
    result
        Waits for its results, and returns them; for the thread that submitted it.
    future
        What is waited for; None if the results are there.
    """

    result: Callable[[], T]
    future: Future[Any] | None = None


class Caller:
    """Calls one function in one task, and holds its contexts meanwhile; for the task's thread.

    Parameters
    ----------
    sealed
        The pickled ``Call``.
    refs
        The contexts to acquire, in the order of ``Call.names``.
    stats
        Collects what the task does.
    """

    def __init__(self, sealed: Sealed, refs: Sequence[ContextRef], stats: TaskStats) -> None:
        self.call: Call = sealed.open()
        self._refs = refs
        self._stats = stats
        self.tally = Tally()
        if self.call.batch_rows is not None:
            self.tally = stats.tallies.setdefault(sealed.digest, self.tally)
        #: The contexts of a function that is served; held from the first batch to ``close``.
        self._held: list[Any] | None = None
        self._stack = ExitStack()

    def close(self) -> None:
        """Let go of contexts that are held for batches in flight."""
        self._held = None
        self._stack.close()

    def each(self, frame: pd.DataFrame, watch: Watch | None = None) -> Iterator[Any]:
        """Call the function on `frame`, ``batch_rows`` rows at a time; yield what it returns.

        The contexts are held until the generator ends.
        """
        cut = self._cut(frame)  # before the contexts are held: other lanes wait for them
        if watch is not None:
            watch.waits()
        with hold(self._refs, self._stats) as contexts:
            if self.call.is_served:
                contexts = attendants(self._refs, contexts)
            if self.call.batch_rows is None:
                yield self.call.on(frame, contexts)
                return
            start = 0
            for rows in cut:
                if watch is not None:
                    watch.calls(start, start + len(rows), len(frame))
                start += len(rows)
                self.tally.begin_batch()
                yield self._batch(rows, contexts)

    def results(self, frame: pd.DataFrame, watch: Watch | None = None) -> list[pd.DataFrame]:
        """The results on `frame`, by batch; by rows, each is checked and on its rows' index."""
        if not len(frame):
            return [self.call.meta.copy()]
        return self.checked(frame, list(self.each(frame, watch)))

    def checked(self, frame: pd.DataFrame, found: list[Any]) -> list[pd.DataFrame]:
        """What ``each`` has yielded for `frame`: by rows, checked and on the index of its rows."""
        if self.call.batch_rows is None:
            return found
        pairs = zip(self._cut(frame), found, strict=True)
        return [self.call.one_for_each(rows, result) for rows, result in pairs]

    def submit(self, frame: pd.DataFrame, watch: Watch) -> Submission[list[pd.DataFrame]]:
        """Begin a batch; a function that is not served is called at once."""
        if not self.call.is_served or not len(frame):
            found = self.results(frame, watch)
            return Submission(lambda: found)
        if self._held is None:
            watch.waits()
            values = self._stack.enter_context(hold(self._refs, self._stats))
            self._held = attendants(self._refs, values)
        contexts = self._held
        watch.calls(0, len(frame), len(frame))
        self.tally.begin_batch()
        future = self.call.submit(frame.copy(deep=False), contexts)
        collect = lambda: [  # noqa: E731
            self.call.one_for_each(frame, self._batch(frame, contexts, future.result))
        ]
        return Submission(collect, future)

    def failed(self, frame: pd.DataFrame, error: Exception) -> list[pd.DataFrame]:
        """The results if all rows fail with `error`, without a call of the function."""
        self.tally.begin_batch()
        self.tally.succeed()
        rows = [frame.iloc[at : at + 1] for at in range(len(frame))]
        meta = self.call.meta
        return [pd.concat([self.call.cast(failed_row(row, meta, error)) for row in rows])]

    def _cut(self, frame: pd.DataFrame) -> list[pd.DataFrame]:
        """The rows of each call."""
        size = self.call.batch_rows
        if size is None or len(frame) <= size:
            return [frame]
        return [frame.iloc[at : at + size] for at in range(0, len(frame), size)]

    def _batch(
        self,
        frame: pd.DataFrame,
        contexts: Sequence[Any],
        compute: Callable[[], Any] | None = None,
    ) -> Any:
        """Call the function on one batch; if it raises, bisect down to the failing rows.

        What it returned is not checked, except after a bisection.
        """
        try:
            result = self.call.on(frame, contexts) if compute is None else compute()
        except PCMError:
            raise
        except Exception as error:
            # A sticky device error fails every later call in this process; bisecting would blame
            # rows that are fine.
            if is_sticky(error):
                raise
            if len(frame) == 1:
                self.tally.fail(frame, error)
                return self.call.cast(failed_row(frame, self.call.meta, error))
        else:
            self.tally.succeed()
            return result
        # Outside the except block: errors of the halves must not be chained to this one.
        half = len(frame) // 2
        return pd.concat(
            [
                self.call.one_for_each(rows, self._batch(rows, contexts))
                for rows in (frame.iloc[:half], frame.iloc[half:])
            ]
        )


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
    caller = Caller(call, refs, TaskStats())
    opened, is_by_rows = caller.call, caller.call.batch_rows is not None
    if not len(frame):
        if is_by_rows and position is not None:
            # Record that this partition has no rows, so the check moves on to the next one.
            is_hopeless(position, Failing(0))
        return opened.meta.copy()
    parts: list[Any] = []
    for part in caller.each(frame):
        parts.append(part)
        if position is not None and len(parts) == N_BATCHES:
            _check_hope(position, caller.tally)
    # After the contexts are released: the check may wait, and another lane can use them meanwhile.
    if is_by_rows and position is not None and len(parts) < N_BATCHES:
        _check_hope(position, caller.tally)
    return opened.joined(caller.checked(frame, parts))


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
