"""``map_partitions`` builds an ordinary Dask DataFrame whose tasks hold live contexts."""

from __future__ import annotations

import functools
import inspect
import operator
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
from dask_pcm.frames.call import Call
from dask_pcm.frames.caller import infer
from dask_pcm.frames.failed_rows import ERROR, row_wise_meta
from dask_pcm.scheduling.rules.first_batches import Position


class ContextMap(CumulativeAggregations):
    """A map over partitions that holds contexts: one task per partition.

    The expression is not blockwise, so Dask fuses nothing above into it: its tasks keep their key
    prefix and need only its own contexts. Reads and projections directly below are folded in, so
    one task reads a partition and infers it on the same worker.

    It derives from ``CumulativeAggregations`` only because Dask treats that class as aligned with
    its input without being blockwise (``are_co_aligned``). Otherwise combining it with its input,
    as in ``claims.assign(verdict=verdicts.verdict)``, would shuffle partitions by index, which is
    wrong if every file numbers its rows from 0.
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
        """The empty output frame; Dask's hook."""
        return self.operand("meta")

    def _divisions(self) -> tuple[Any, ...]:
        """Divisions of the input: the index does not change; Dask's hook."""
        return tuple(self.frame.divisions)

    @functools.cached_property
    def _name(self) -> str:
        """The key prefix: the function's name and a deterministic token; Dask's hook."""
        return f"{self.operand('label')}-{self.deterministic_token}"

    def _lower(self) -> None:
        """Not lowered to another expression: ``_layer`` makes the tasks; Dask's hook."""

    @property
    def _is_length_preserving(self) -> bool:
        """Whether each input row gives one output row, so ``len`` needs no inference."""
        return self.operand("batch_rows") is not None

    def _simplify_up(self, parent: Expr, dependents: Any) -> Expr | None:
        """Select partitions before inference; if row-wise, also the first or last rows."""
        is_picked = isinstance(parent, Partitions)
        if is_picked or (self._is_length_preserving and isinstance(parent, (Head, Tail))):
            picked = type(parent)(self.frame, *parent.operands[1:])
            return type(self)(picked, *self.operands[1:])
        return None

    def _own_task(self, name: Any, index: int, position: Position | None = None) -> Task:
        """The task that infers partition `index`, without the folded reads."""
        below = TaskRef((self.frame._name, index))
        return Task(name, infer, below, self.operand("call"), self.operand("refs"), position)

    def _layer(self) -> dict[Any, Task]:
        """One task per partition, fused with the reads below it; Dask's hook."""
        folded = list(_foldable(self.frame))
        layer = {}
        for index in range(self.frame.npartitions):
            name = (self._name, index)
            own = self._own_task(name, index, Position(*name, self.frame.npartitions))
            below = (expr._task((expr._name, index), index) for expr in reversed(folded))
            layer[name] = Task.fuse(*below, own, key=name) if folded else own
        return layer


def _foldable(expr: Expr) -> Iterator[Expr]:
    """Reads, projections and heads below `expr`, which are cheap to compute twice.

    Folding duplicates them if other expressions use them too.
    """
    npartitions = expr.npartitions
    while _is_cheap(expr) and expr.npartitions == npartitions:
        yield expr
        below = expr.dependencies()
        if len(below) != 1:
            return
        (expr,) = below


def _is_cheap(expr: Expr) -> bool:
    """Whether an expression may be computed twice."""
    if isinstance(expr, FromMap) and not _is_reader(expr.operand("func")):
        return False  # a user's function may be expensive or not deterministic
    if isinstance(expr, Fused):
        return all(_is_cheap(part) for part in expr.exprs)
    cheap = (Projection, ArrowStringConversion, BlockwiseIO, BlockwiseHead, BlockwiseTail)
    is_cheap = isinstance(expr, cheap)
    return is_cheap and isinstance(expr, Blockwise) and len(expr.dependencies()) <= 1


def _is_reader(func: Any) -> bool:
    """Whether a function is from Dask or dask_pcm, and so only reads files."""
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
    func : callable
        Called on a worker as ``func(frame, live, *args, **kwargs)``. `frame` is a pandas
        DataFrame, and `live` is the object that the context's loader returned. Several contexts
        are passed as keywords instead. A plain function, or an object with ``__call__``.
    ddf : dask.dataframe.DataFrame
        Any Dask DataFrame. If it comes from ``dask_pcm.read_parquet``, its partitions are pieces
        and runs resume at row ranges.
    *args, **kwargs
        Passed on to `func`.
    context : Context or dict of str to Context
        The context, or several by keyword.
    meta : dict, pandas.DataFrame or callable
        The columns and dtypes of the result: a dict of column to dtype, an empty frame, a
        function that makes one from the empty input, or any other `meta` that Dask accepts.
    batch_rows : int, optional
        Call `func` on at most this many rows at a time. It must then return one row per input row,
        in order. If a row raises, its ``error`` column holds the exception and its other new
        columns are null; other rows of the batch are unaffected. The ``error`` column is added if
        `meta` lacks it, and integer and boolean columns become pandas' nullable dtypes. In
        ``write_parquet`` a row that kills its worker process fails in the same way. If omitted,
        `func` gets whole partitions and may filter or expand them.

        Any number of rows may fail, with one exception: if every row of the first three batches
        (or of all, if there are fewer) raises the same type of exception, that exception is
        raised, with one of its rows. Batches count in the order of the frame, so bad rows further
        on, even a whole file of them, never stop the computation.
    batch_timeout : float or str, optional
        Limit for one call of `func`, in seconds or as text ("10m"). Needs `batch_rows`. No limit
        by default (but see ``pcm.run.batch-timeout``). A call that exceeds it is terminated with
        its worker process, which the nanny restarts. Time spent waiting for an exclusive context
        does not count. In ``write_parquet``, the rows are then bisected, like those of calls that
        kill their process, until the slow rows are isolated; these fail with a timeout. Elsewhere
        the task fails with ``KilledWorker`` after several processes.
    required_columns : str or iterable of str, optional
        Columns that `func` reads. Other columns are not read from disk.
    enforce_metadata : bool, default True
        Whether to check the columns and dtypes of each result against `meta`.

    Returns
    -------
    dask.dataframe.DataFrame
        An ordinary, lazy Dask DataFrame with the index and divisions of `ddf`.

    Raises
    ------
    RecipeError, SchemaError, ArgumentError
        Raised immediately, if the function cannot be pickled or called, or the arguments do not
        fit the frame.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise frame_refused("map_partitions", ddf)
    if batch_rows is not None:
        batch_rows = _count(batch_rows)
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
    given = context.values() if isinstance(context, Mapping) else [context]
    if call.is_served and any(one.ref.is_exclusive for one in given):
        raise SchemaError(
            f"{funcname(func)} says is_served: several batches of it use a context at a time. Make"
            " the context with exclusive=False."
        )
    # The identity of a job excludes what changes no answer: the batch size, the timeout, and the
    # dtypes (which integers are nullable depends on the files that exist now). Tasks with other
    # values still get other keys, through the expression's operands.
    is_row_wise = batch_rows is not None
    identity = (func, names, args, kwargs, list(out.columns), is_row_wise, enforce_metadata)
    what = f"The function {funcname(func)!r}, or an argument of it,"
    sealed = Sealed.of(call, what, identity)
    label = f"pcm_{funcname(func).replace('-', '_')}"
    return new_collection(ContextMap(ddf.expr, sealed, refs, out, label, batch_rows, timeout_s))


def _count(given: Any) -> int:
    """A number of rows, also NumPy's; SchemaError if it is none."""
    try:
        found = 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        found = 0
    if found < 1:
        raise SchemaError(f"batch_rows must be a whole number, at least 1; found {given!r:.80}.")
    return found


def _timeout_s(given: float | str | None, batch_rows: int | None) -> float | None:
    """The limit of one call in seconds; SchemaError if it is invalid or `batch_rows` is missing."""
    if given is None:
        return None
    if batch_rows is None:
        raise SchemaError(
            f"batch_timeout={given!r} needs batch_rows: without it, slow rows cannot be isolated."
            " Set batch_rows, and let the function return one row per input row."
        )
    try:
        return some_seconds(given)
    except (TypeError, ValueError, KeyError):
        raise SchemaError(
            f"batch_timeout must be a positive duration, for example 90 or '10m'; found {given!r}."
        ) from None


_OPTIONS = tuple(inspect.signature(map_partitions).parameters)


def check_columns(ddf: dd.DataFrame, names: str | Iterable[str], what: str) -> list[str]:
    """Return one or several column names as a list; raise SchemaError if one is missing."""
    names = [names] if isinstance(names, str) else list(names)
    if missing := [name for name in names if name not in ddf.columns]:
        raise SchemaError(
            f"{what} names {', '.join(map(repr, missing))}, which the frame does not have; its"
            f" columns are {', '.join(map(repr, ddf.columns))}."
        )
    return names


def _check_error_column(out: pd.DataFrame, ddf: dd.DataFrame) -> None:
    """Refuse an ``error`` column of the user's own, which failed rows would overwrite.

    One that an earlier row-wise map added is accepted: its errors stay unless a row fails again.
    """
    if ERROR not in out.columns or ERROR not in ddf.columns:
        return
    maps = (expr for expr in ddf.expr.walk() if isinstance(expr, ContextMap))
    if not any(ERROR in expr._meta.columns for expr in maps):
        raise SchemaError(
            f"The input already has a column {ERROR!r}, which holds the errors of failed rows."
            f" Rename it, for example with ddf.rename(columns={{{ERROR!r}: 'their_error'}}), or"
            " leave it out of meta."
        )


def _contexts(
    context: Context | Mapping[str, Context],
) -> tuple[tuple[str, ...] | None, tuple[ContextRef, ...]]:
    """Keywords (None for one positional context) and refs; RecipeError if it is something else."""
    if isinstance(context, Context):
        return None, (context.ref,)
    if not isinstance(context, Mapping) or not context:
        raise RecipeError(
            "context= takes a dask_pcm.Context or a dict of them by keyword; found"
            f" {context!r:.80}. A live model cannot be sent to workers: write"
            " dask_pcm.Context(load, path), where load is a function that returns the model."
        )
    for name, value in context.items():
        if not isinstance(value, Context):
            raise RecipeError(
                f"context[{name!r}] must be a dask_pcm.Context; found {value!r:.80}."
                " Write dask_pcm.Context(load, path), where load is a function that returns the"
                " model."
            )
    return tuple(context), tuple(value.ref for value in context.values())


def _meta(meta: Any, ddf: dd.DataFrame) -> pd.DataFrame:
    """The user's `meta` as an empty frame; SchemaError if it is no frame or repeats a column."""
    meta = meta(ddf._meta.copy()) if callable(meta) else meta
    out = make_meta(meta, index=ddf._meta.index, parent_meta=ddf._meta)
    if not isinstance(out, pd.DataFrame):
        raise SchemaError(
            f"meta must describe a DataFrame, for example {{'id': 'i8', 'verdict': 'str'}}; found"
            f" {meta!r:.80}."
        )
    if repeated := sorted({str(name) for name in out.columns[out.columns.duplicated()]}):
        raise SchemaError(f"meta names columns more than once: {', '.join(repeated)}.")
    return out
