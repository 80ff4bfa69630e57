"""The user's function: how it is called, and how what it returns is checked against `meta`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from dask_pcm.errors import RowCountError, SchemaError
from dask_pcm.frames.detach import detached
from dask_pcm.frames.failed_rows import ERROR, with_error, without_categories
from dask_pcm.futures import then
from dask_pcm.parquet.conversion import MISFITS, cast
from dask_pcm.plugins.worker.deadline import in_time


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
        """Whether several batches may be in flight: the function says ``is_served = True``.

        Then it has a method ``submit``, which is called like the function and returns a future. For
        a context with an attendant it gets the attendant instead of the live object; see
        ``ladder/residency.py``.
        """
        return self.batch_rows is not None and getattr(self.func, "is_served", False) is True

    @property
    def has_drafts(self) -> bool:
        """Whether rows that are not finished leave drafts: the function says ``has_drafts = True``.

        Then its attendants are ``Drafting``; see ``ladder/residency.py``.
        """
        return self.is_served and getattr(self.func, "has_drafts", False) is True

    def on(self, frame: pd.DataFrame, contexts: Sequence[Any]) -> Any:
        """Call the user's function once, within the time limit of a batch.

        Must run on the task's thread: the deadline and interrupts are tied to it.
        """
        # The function may modify its frame. A shallow copy isolates the original (pandas copies
        # on write): bisection passes the same rows again, and other tasks share a persisted
        # partition.
        frame = frame.copy(deep=False)
        limit = nullcontext() if self.batch_rows is None else in_time(self.timeout_s)
        with self.raising(), limit:
            if self.is_served:
                return self.submit(frame, contexts).result()
            args, kwargs = self._arguments(contexts)
            # Still with the contexts held: another task may use the live object after that.
            return detached(self.func(frame, *args, **kwargs))

    def submit(self, frame: pd.DataFrame, contexts: Sequence[Any]) -> Future[pd.DataFrame]:
        """Hand a batch to a function that is served; it gets attendants instead of live objects."""
        args, kwargs = self._arguments(contexts)
        with self.raising():
            submitted = self.func.submit(frame, *args, **kwargs)  # type: ignore[attr-defined] # it is served
        if not isinstance(submitted, Future):
            raise SchemaError(
                f"{_name(self.func)}.submit returned {type(submitted).__name__}; expected a"
                " concurrent.futures.Future of a DataFrame."
            )
        # As soon as it is there: its memory may be written to after that.
        return then(submitted, detached)

    def _arguments(self, contexts: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the function is called with after its frame."""
        if self.names is None:
            return (*contexts, *self.args), dict(self.kwargs)
        return self.args, {**self.kwargs, **dict(zip(self.names, contexts, strict=True))}

    @contextmanager
    def raising(self) -> Iterator[None]:
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
        wanted = self._dtypes[name]
        if _is_empty_of_others(column.dtype, wanted):
            return column.cat.set_categories(wanted.categories[:0])
        try:
            return cast(column, without_categories(wanted))
        except MISFITS as error:
            raise SchemaError(
                f"{_name(self.func)} returned {name!r} as {column.dtype}, which does not convert to"
                f" the dtype in meta, {self._dtypes[name]}: {error}."
            ) from error

    def _is_right(self, name: Any, dtype: Any) -> bool:
        """Whether a column's dtype is that in `meta`; categories may differ."""
        wanted = self._dtypes[name]
        if _is_empty_of_others(dtype, wanted):
            return False
        return bool(dtype == wanted or without_categories(dtype) == without_categories(wanted))


def _is_empty_of_others(dtype: Any, wanted: Any) -> bool:
    """Whether a categorical has no categories, of another dtype than those wanted.

    As one of nulls alone, whose categories are floats or objects: Dask does not concatenate it with
    texts of other partitions.
    """
    both = isinstance(dtype, pd.CategoricalDtype) and isinstance(wanted, pd.CategoricalDtype)
    return both and not len(dtype.categories) and dtype.categories.dtype != wanted.categories.dtype


def _name(func: Any) -> str:
    """The name of a callable in messages."""
    return getattr(func, "__qualname__", None) or type(func).__qualname__
