"""``map_partitions`` with contexts, as an expression of an ordinary Dask DataFrame."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
from dask._task_spec import Task, TaskRef
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._cumulative import CumulativeAggregations
from dask.dataframe.dask_expr._expr import (
    ArrowStringConversion,
    Blockwise,
    BlockwiseHead,
    BlockwiseTail,
    Expr,
    Fused,
    Head,
    Partitions,
    Projection,
    Tail,
)
from dask.dataframe.dask_expr.io.io import BlockwiseIO, FromMap
from dask.dataframe.utils import make_meta
from dask.utils import funcname

from dask_pcm.arguments import FRAME, LIVE, check_function, checked, frame_refused
from dask_pcm.config import some_seconds
from dask_pcm.context.context import Context, ContextRef
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import RecipeError, SchemaError
from dask_pcm.frames.call import ERROR, Call, infer, row_wise_meta
from dask_pcm.scheduling.rules.first_batches import Position


class ContextMap(CumulativeAggregations):
    """A map over partitions that holds contexts: one task a partition.

    Not blockwise to Dask: what stands above it is never fused into it, so its tasks keep their
    prefix and need its contexts alone. The reads and projections right below it are folded in,
    so that a partition is read where it is inferred.

    It derives from the one kind of expression that Dask takes to be aligned with its input without
    being blockwise (``are_co_aligned``); nothing else of it is used. Put together with its input,
    as in ``claims.assign(verdict=verdicts.verdict)``, partitions would be shuffled by their index
    otherwise, which is wrong where every file counts its rows from 0.
    """

    _parameters = [  # noqa: RUF012 Dask's
        "frame",
        "call",
        "refs",
        "meta",
        "label",
        "batch_rows",
        "timeout_s",
    ]
    _defaults: dict[str, Any] = {}  # noqa: RUF012
    _preserves_partitioning_information = True

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return self.operand("meta")

    def _divisions(self) -> tuple[Any, ...]:
        return tuple(self.frame.divisions)

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.operand('label')}-{self.deterministic_token}"

    def _lower(self) -> None:
        return None

    @property
    def _is_length_preserving(self) -> bool:
        return self.operand("batch_rows") is not None

    def _simplify_up(self, parent: Expr, dependents: Any) -> Expr | None:
        """Pick partitions before they are inferred and, by rows, the first and last rows too."""
        is_picked = isinstance(parent, Partitions)
        if is_picked or (self._is_length_preserving and isinstance(parent, (Head, Tail))):
            picked = type(parent)(self.frame, *parent.operands[1:])
            return type(self)(picked, *self.operands[1:])
        return None

    def _own_task(self, name: Any, index: int, position: Position | None = None) -> Task:
        below = TaskRef((self.frame._name, index))
        return Task(name, infer, below, self.operand("call"), self.operand("refs"), position)

    def _layer(self) -> dict[Any, Task]:
        folded = list(_foldable(self.frame))
        layer = {}
        for index in range(self.frame.npartitions):
            name = (self._name, index)
            own = self._own_task(name, index, Position(*name, self.frame.npartitions))
            below = (expr._task((expr._name, index), index) for expr in reversed(folded))
            layer[name] = Task.fuse(*below, own, key=name) if folded else own
        return layer


def _foldable(expr: Expr) -> Iterator[Expr]:
    """Reads, projections and heads below `expr`: nothing that is dear to compute twice."""
    npartitions = expr.npartitions
    while _is_cheap(expr) and expr.npartitions == npartitions:
        yield expr
        below = expr.dependencies()
        if len(below) != 1:
            return
        (expr,) = below


def _is_cheap(expr: Expr) -> bool:
    if isinstance(expr, FromMap) and not _is_reader(expr.operand("func")):
        return False  # a function of the user's: dear, or another answer each time
    if isinstance(expr, Fused):
        return all(_is_cheap(part) for part in expr.exprs)
    cheap = (Projection, ArrowStringConversion, BlockwiseIO, BlockwiseHead, BlockwiseTail)
    is_cheap = isinstance(expr, cheap)
    return is_cheap and isinstance(expr, Blockwise) and len(expr.dependencies()) <= 1


def _is_reader(func: Any) -> bool:
    """Whether it is ours or Dask's, and so reads files."""
    while isinstance(func, functools.partial):
        func = func.func
    return str(func.__module__).partition(".")[0] in ("dask", "dask_pcm")


@checked
def map_partitions(
    func: Callable[..., Any],
    ddf: dd.DataFrame,
    *args: Any,
    context: Context | Mapping[str, Context],
    meta: Any,
    batch_rows: int | None = None,
    batch_timeout: float | str | None = None,
    required_columns: str | Iterable[str] | None = None,
    enforce_metadata: bool = True,
    **kwargs: Any,
) -> dd.DataFrame:
    """Apply a function that needs live contexts to every partition.

    Parameters
    ----------
    func
        Called on a worker as ``func(frame, live, *args, **kwargs)``, where `frame` is a pandas
        DataFrame and `live` what the context's loader returned. With several contexts they come
        as keywords instead. A plain function, or an object with ``__call__``.
    ddf
        Any Dask DataFrame; read by ``dask_pcm.read_parquet`` its pieces make runs resumable to
        the row range.
    context
        One ``Context``, or a dict of them by keyword.
    meta
        What comes out: a dict of column to dtype, an empty frame, a function that makes one of
        the empty input, or anything else that Dask takes as `meta`.
    batch_rows
        Call `func` on so many rows at a time; it must return one row for each, in order. A row
        that makes it raise gets nulls and its reason in the column ``error``, which is added if
        `meta` lacks it; columns that cannot be null (integers, booleans) become pandas' nullable
        types. In ``write_parquet`` that holds of a row, too, that ends the worker process. Without
        `batch_rows`, `func` gets the partition and may filter or expand.

        Any number of rows may fail, unless nothing else comes: where every row of the first three
        batches raises one type of exception (or every row, if there are fewer batches), that
        exception is raised, with a row that made it. First is what comes first in the frame, so
        rows that are bad further on, a whole file of them, end nothing.
    batch_timeout
        What a call of `func` on `batch_rows` rows may take, in seconds or as a text ("10m"); no
        limit if left out (but see ``pcm.run.batch-timeout``). A call that takes longer is ended
        with its worker process, which a nanny starts anew; waiting for an exclusive context does
        not count. In ``write_parquet`` its rows are then halved, as those of calls that end their
        process, until those that take too long are alone: they fail with that reason. Elsewhere
        the task ends with ``KilledWorker`` once it has cost several processes.
    required_columns
        Columns that `func` reads; the others are not even read from disk.
    enforce_metadata
        Hold columns and types of each result against `meta`.

    Returns
    -------
    dask.dataframe.DataFrame
        An ordinary, lazy Dask DataFrame with the index and divisions of `ddf`.

    Raises
    ------
    RecipeError, SchemaError, ArgumentError
        At once, where the function cannot be pickled or called, or the arguments do not fit the
        frame.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise frame_refused("map_partitions", ddf)
    if batch_rows is not None and (not isinstance(batch_rows, int) or batch_rows < 1):
        raise SchemaError(f"batch_rows must be a whole number, at least 1; found {batch_rows!r}.")
    timeout_s = _timeout_s(batch_timeout, batch_rows)
    if any(dask.is_dask_collection(value) for value in (*args, *kwargs.values())):
        raise SchemaError(
            "map_partitions maps over one Dask DataFrame; join the others to it first, or compute"
            " them and pass the result."
        )
    names, refs = _contexts(context)
    live = (LIVE,) if names is None else ()
    named = dict.fromkeys(names or (), LIVE)
    check_function(func, (FRAME, *live, *args), {**kwargs, **named}, _OPTIONS)
    if required_columns is not None:
        ddf = ddf[check_columns(ddf, required_columns, "required_columns")]
    out = _meta(meta, ddf)
    if batch_rows is not None:
        _check_error_column(out, ddf)
        out = row_wise_meta(out, ddf._meta)
    call = Call(func, names, args, kwargs, batch_rows, out, enforce_metadata, timeout_s)
    # How many rows are called at a time, and how long that may take, changes no answer: it tells no
    # jobs apart, only tasks. So
    # with types: which numbers can be null changes with the files that there are.
    is_row_wise = batch_rows is not None
    identity = (func, names, args, kwargs, list(out.columns), is_row_wise, enforce_metadata)
    what = f"The function {funcname(func)!r}, or an argument of it,"
    sealed = Sealed.of(call, what, identity)
    label = f"pcm_{funcname(func).replace('-', '_')}"
    return new_collection(ContextMap(ddf.expr, sealed, refs, out, label, batch_rows, timeout_s))


def _timeout_s(given: float | str | None, batch_rows: int | None) -> float | None:
    """What a call may take; SchemaError where that is no time, or nothing would be left to do."""
    if given is None:
        return None
    if batch_rows is None:
        raise SchemaError(
            f"batch_timeout={given!r} needs batch_rows: only rows that can be called apart can be"
            " told from others. Give batch_rows, and let the function return a row for each."
        )
    try:
        return some_seconds(given)
    except (TypeError, ValueError, KeyError):
        raise SchemaError(
            f"batch_timeout must be a time of more than 0, for instance 90 or '10m'; found"
            f" {given!r}."
        ) from None


_OPTIONS = tuple(inspect.signature(map_partitions).parameters)


def check_columns(ddf: dd.DataFrame, names: str | Iterable[str], what: str) -> list[str]:
    """Return `names`, or the one name, as a list; raise SchemaError where one is no column."""
    names = [names] if isinstance(names, str) else list(names)
    if missing := [name for name in names if name not in ddf.columns]:
        raise SchemaError(
            f"{what} names {', '.join(map(repr, missing))}, which the frame does not have; its"
            f" columns are {', '.join(map(repr, ddf.columns))}."
        )
    return names


def _check_error_column(out: pd.DataFrame, ddf: dd.DataFrame) -> None:
    """Refuse a column of the user's data where the reasons of failed rows go.

    One that an earlier map by rows has made is welcome: its reasons stay where no new ones come.
    """
    if ERROR not in out.columns or ERROR not in ddf.columns:
        return
    maps = (expr for expr in ddf.expr.walk() if isinstance(expr, ContextMap))
    if not any(ERROR in expr._meta.columns for expr in maps):
        raise SchemaError(
            f"The input already has a column {ERROR!r}, where the reasons of failed rows go. Rename"
            f" it, for instance with ddf.rename(columns={{{ERROR!r}: 'their_error'}}), or leave it"
            " out of meta."
        )


def _contexts(
    context: Context | Mapping[str, Context],
) -> tuple[tuple[str, ...] | None, tuple[ContextRef, ...]]:
    if isinstance(context, Context):
        return None, (context.ref,)
    if not isinstance(context, Mapping) or not context:
        raise RecipeError(
            "context= takes a dask_pcm.Context or a dict of them by keyword; found"
            f" {context!r:.80}. A live model does not travel: write dask_pcm.Context(load, path),"
            " where load is a function that returns it."
        )
    for name, value in context.items():
        if not isinstance(value, Context):
            raise RecipeError(
                f"context[{name!r}] is no dask_pcm.Context but {value!r:.80}."
                " Write dask_pcm.Context(load, path), where load is a function that returns it."
            )
    return tuple(context), tuple(value.ref for value in context.values())


def _meta(meta: Any, ddf: dd.DataFrame) -> pd.DataFrame:
    meta = meta(ddf._meta.copy()) if callable(meta) else meta
    out = make_meta(meta, index=ddf._meta.index, parent_meta=ddf._meta)
    if not isinstance(out, pd.DataFrame):
        raise SchemaError(
            f"meta must describe a DataFrame, for instance {{'id': 'i8', 'verdict': 'str'}}; found"
            f" {meta!r:.80}."
        )
    if repeated := sorted({str(name) for name in out.columns[out.columns.duplicated()]}):
        raise SchemaError(f"meta names columns more than once: {', '.join(repeated)}.")
    return out
