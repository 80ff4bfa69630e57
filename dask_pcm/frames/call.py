"""What a task does with a partition: call the user's function on live contexts, and check it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dask_pcm.context.context import ContextRef
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import PCMError, RowCountError, SchemaError, redacted
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.parquet.conversion import MISFITS, cast
from dask_pcm.plugins.worker.deadline import in_time
from dask_pcm.plugins.worker.first_batches import is_hopeless
from dask_pcm.plugins.worker.tally import Tally, unpack
from dask_pcm.plugins.worker.task import hold, task_stats
from dask_pcm.scheduling.rules.first_batches import N_BATCHES, Failing, Position

ERROR = "error"
_MAX_ERROR_CHARS = 2_000
_NULLABLE_KINDS = "iub"


class _Withheld(threading.local):
    """Why functions by rows are not called on this thread; None where they are."""

    error: Exception | None = None


_withheld = _Withheld()


@contextmanager
def failing_all_rows(error: Exception) -> Iterator[None]:
    """Within, on this thread, functions by rows are not called: rows fail as if they had raised.

    So rows fail that no function may see again, and are like all that fail.
    """
    _withheld.error = error
    try:
        yield
    finally:
        _withheld.error = None


class _Notes(threading.local):
    """Who is told, on this thread, how far the rows at hand are; None: nobody."""

    on_wait: Callable[[], None] | None = None
    on_call: Callable[[int, int, int], None] | None = None


_notes = _Notes()


@contextmanager
def noting(on_wait: Callable[[], None], on_call: Callable[[int, int, int], None]) -> Iterator[None]:
    """Within, on this thread, say what functions by rows are about to do.

    Parameters
    ----------
    on_wait
        Called before a context is waited for: until the next call the rows do nothing.
    on_call
        Called as ``on_call(start, stop, n_rows)`` right before a function is called on the rows
        from `start` to `stop` of a frame of `n_rows`.
    """
    _notes.on_wait, _notes.on_call = on_wait, on_call
    try:
        yield
    finally:
        _notes.on_wait = _notes.on_call = None


@dataclass(frozen=True, slots=True)
class Call:
    """The user's function and how it is to be called.

    Attributes
    ----------
    func
        Called as ``func(frame, context, *args, **kwargs)``, or with contexts as keywords.
    names
        Keywords of the contexts, in the order of the refs; None for one positional context.
    batch_rows
        Rows of one call; None to give the partition as it is.
    meta
        An empty frame of what comes out.
    is_enforced
        Whether columns and types are held against `meta`.
    timeout_s
        What one call may take; None for no limit of its own.
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
        """Apply the function to a whole partition, as many rows at a time as it takes."""
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
        """What the function returned, put together and held against what was declared."""
        if self.batch_rows is None:
            return self._enforced(parts[0])
        if any(not part.dtypes.equals(parts[0].dtypes) for part in parts[1:]):
            # Put together as they are, whole numbers and nulls would become rounded floats.
            parts = [self._enforced(self._with_error(part)) for part in parts]
        result = parts[0] if len(parts) == 1 else pd.concat(parts)
        return self._enforced(self._with_error(result))

    def _with_error(self, result: pd.DataFrame) -> pd.DataFrame:
        if ERROR not in result.columns:
            result = result.assign(**{ERROR: _no_error(result)})
        return result

    def _call(self, frame: pd.DataFrame, contexts: Sequence[Any]) -> Any:
        # What the function does to its frame stays its own (pandas copies on write): rows may be
        # given to it again, and a persisted partition is everybody's.
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
                raise  # in the main thread it may be the user who interrupts
            # Dask would end the worker, or wait for the task for ever.
            raise RuntimeError(f"{_name(self.func)} raised {error!r}") from error

    def _batch(self, frame: pd.DataFrame, contexts: Sequence[Any], tally: Tally) -> pd.DataFrame:
        """One call; where it raises, halves are tried, down to the rows that are at fault."""
        if _withheld.error is not None:
            tally.succeed()
            rows = [frame.iloc[at : at + 1] for at in range(len(frame))]
            return pd.concat([self._failed(row, _withheld.error) for row in rows])
        try:
            result = self._call(frame, contexts)
        except PCMError:
            raise
        except Exception as error:
            if is_sticky(error):  # nothing else would run here, whatever the rows
                raise
            if len(frame) == 1:
                tally.fail(frame, error)
                return self._failed(frame, error)
        else:
            tally.succeed()
            return self._one_for_each(frame, result)
        # Out of reach of the handler: what halves raise is not to tell of this exception as well.
        half = len(frame) // 2
        halves = (frame.iloc[:half], frame.iloc[half:])
        return pd.concat([self._batch(rows, contexts, tally) for rows in halves])

    def _one_for_each(self, frame: pd.DataFrame, result: Any) -> pd.DataFrame:
        name = _name(self.func)
        if not isinstance(result, pd.DataFrame):
            raise RowCountError(
                f"{name} returned {type(result).__name__}; a DataFrame with a row for each of the"
                f" {len(frame)} rows that it got was expected."
            )
        if len(result) != len(frame):
            raise RowCountError(
                f"{name} got {len(frame)} rows and returned {len(result)}. With batch_rows it must"
                " return one row for each, in order; leave batch_rows out to filter or expand."
            )
        if not result.index.equals(frame.index):
            if not result.index.equals(pd.RangeIndex(len(result))):
                raise RowCountError(
                    f"{name} returned rows with another index than it got, so their order cannot be"
                    " told. Keep the index, or reset it if the rows are in order."
                )
            result = result.set_axis(frame.index)
        if self.is_enforced:
            self._check_columns(result)
        return result

    def _failed(self, frame: pd.DataFrame, error: Exception) -> pd.DataFrame:
        """The row that cannot be inferred: its own columns, nulls for the rest, and the reason."""
        text = _reason(error)
        row = {
            name: frame[name] if _is_passed(name, dtype, frame) else pd.Series([None], frame.index)
            for name, dtype in self.meta.dtypes.items()
        }
        row[ERROR] = pd.Series([text], frame.index)
        return self._cast(pd.DataFrame(row, index=frame.index))

    def _enforced(self, result: Any) -> Any:
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
        different = {
            name: _plain(dtype)
            for name, dtype in self.meta.dtypes.items()
            if _plain(frame[name].dtype) != _plain(dtype)
        }
        frame = frame.copy(deep=False)
        for name, dtype in different.items():
            try:
                frame[name] = cast(frame[name], dtype)
            except MISFITS as error:
                raise SchemaError(
                    f"{_name(self.func)} returned {name!r} as {frame[name].dtype}, which does not"
                    f" convert to what meta says, {dtype}: {error}."
                ) from error
        return frame


def infer(
    frame: pd.DataFrame,
    call: Sealed,
    refs: tuple[ContextRef, ...],
    position: Position | None = None,
) -> pd.DataFrame:
    """The task: hold the contexts and call; an empty partition needs neither.

    `position` is where the rows stand in a frame that Dask computes; None in a run, whose driver
    sees for itself what comes of them.

    Raises
    ------
    Exception
        What the function raised, where it fails on the first rows of the frame, all of them.
    """
    opened: Call = call.open()
    is_by_rows = opened.batch_rows is not None
    if is_by_rows:
        task_stats.is_by_rows, task_stats.errors = True, []
    if not len(frame):
        if is_by_rows and position is not None:
            is_hopeless(position, Failing(0))  # what comes after it decides
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
    # Without the contexts: another lane is at it by now.
    if is_by_rows and position is not None and len(parts) < N_BATCHES:
        _check_hope(position, tally)
    result = opened.joined(parts)
    if is_by_rows and ERROR in result.columns:
        task_stats.errors = result[ERROR].dropna().tolist()
    return result


def _check_hope(position: Position, tally: Tally) -> None:
    """Raise the function's own exception where nothing else is to be expected of it."""
    failing = tally.failing
    if failing is not None and failing.n_batches and is_hopeless(position, failing):
        error = unpack(tally.error)
        error.add_note(
            "It ends the computation, since nothing else came of the first rows. If these rows are"
            " bad in themselves, catch the exception in the function and return its text in the"
            f" column {ERROR!r}."
        )
        raise error


def row_wise_meta(meta: pd.DataFrame, given: pd.DataFrame) -> pd.DataFrame:
    """`meta` with an ``error`` column, and with types that can be null where a row may fail."""
    changed = {
        name: pd.array([], dtype=dtype).astype(_nullable(dtype)).dtype
        for name, dtype in meta.dtypes.items()
        if getattr(dtype, "kind", "") in _NULLABLE_KINDS and not _is_passed(name, dtype, given)
    }
    meta = meta.astype(changed)
    return meta if ERROR in meta.columns else meta.assign(**{ERROR: _no_error(meta)})


def _plain(dtype: Any) -> Any:
    """A dtype without its categories: they differ from partition to partition."""
    return "category" if isinstance(dtype, pd.CategoricalDtype) else dtype


def _is_passed(name: Any, dtype: Any, given: pd.DataFrame) -> bool:
    """Whether a column of the output stands in the input as well: a failed row keeps it."""
    return name in given.columns and bool(_plain(given[name].dtype) == _plain(dtype))


def _nullable(dtype: Any) -> str:
    name = str(dtype)
    if name == "bool":
        return "boolean"
    return name.replace("uint", "UInt").replace("int", "Int") if name.islower() else name


def _reason(error: Exception) -> str:
    """The text of an error, whatever it holds."""
    try:
        text = str(error)
    except Exception as broken:
        text = f"(its text cannot be had: {type(broken).__name__})"
    text = redacted(f"{type(error).__name__}: {text}")[:_MAX_ERROR_CHARS]
    return text.encode("utf-8", "backslashreplace").decode()


def _no_error(frame: pd.DataFrame) -> pd.Series:
    return pd.Series([None] * len(frame), index=frame.index, dtype="str")


def _name(func: Any) -> str:
    return getattr(func, "__qualname__", None) or type(func).__qualname__
