"""A frame as units of work: the rows of each, and the graph that computes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from typing import Any

import cloudpickle
import dask
import dask.dataframe as dd
import pandas as pd
from dask._expr import optimize_until
from dask._task_spec import Task, TaskRef
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._expr import Blockwise, Elemwise, Expr, Filter
from distributed import Client, Future, futures_of

from dask_pcm.context.context import ContextRef
from dask_pcm.errors import InputError, SchemaError
from dask_pcm.frames.map_partitions import ContextMap
from dask_pcm.ledger.inventory import Extent
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.parquet.reader import PieceReader, Span
from dask_pcm.paths import names_of
from dask_pcm.runs.units.graph import SPANS, Graph, Step, Unit


class Plan:
    """The graph of a frame by partition, made on demand.

    Attributes
    ----------
    refs
        Contexts that a unit needs.
    spans
        Rows of each partition, where our own reader is at the bottom.
    is_splittable
        Whether a unit may have any rows of a piece.
    keeps_rows
        Whether each row of input then has one row of output.
    batch_rows
        Rows per call; 1 where the function takes partitions.
    timeout_s
        Longest `batch_timeout` of the functions, in seconds; None if none has one.
    n_rows
        Rows of the input; partitions where rows are not known.
    """

    def __init__(self, ddf: dd.DataFrame) -> None:
        with dask.config.set({"optimization.tune.active": False}):  # it regroups partitions
            top = optimize_until(ddf.expr, "simplified-physical")
        self._top = top
        #: What a unit computes itself, and what Dask computes for it (joins, shuffles); by name.
        self._nodes, self._below = _divided(top)
        self._inputs: dict[Any, Future] = {}
        self._any: tuple[bytes, list[Any], list[Future]] | None = None
        maps = [expr for expr in self._nodes.values() if isinstance(expr, ContextMap)]
        refs = {ref.digest: ref for expr in maps for ref in expr.operand("refs")}
        self.refs: tuple[ContextRef, ...] = tuple(refs[digest] for digest in sorted(refs))
        self.label = maps[0].operand("label") if maps else "pcm_write"
        self.batch_rows = max([expr.operand("batch_rows") or 1 for expr in maps] or [1])
        timeouts = [expr.operand("timeout_s") for expr in maps]
        self.timeout_s: float | None = max((s for s in timeouts if s is not None), default=None)
        self._leaf = self._find_leaf()
        self.reader: PieceReader | None = None if self._leaf is None else self._leaf.operand("func")
        self.spans = self._find_spans()
        self.is_splittable = self._leaf is not None and all(
            expr is self._leaf or _is_row_wise(expr) for expr in self._nodes.values()
        )
        self.keeps_rows = self.is_splittable and not any(
            isinstance(expr, Filter) for expr in self._nodes.values()
        )
        # Units refer to the optimised frame's partitions, so these must be the user's.
        self.n_partitions = top.npartitions
        counts = [1] * top.npartitions if self.spans is None else [s.n_rows for s in self.spans]
        self.n_rows = sum(counts)
        if self.n_partitions != ddf.npartitions:
            raise InputError(
                f"Dask's optimiser would turn the {ddf.npartitions} partitions of this frame into"
                f" {self.n_partitions}, so a resume could not identify them. Call .persist() on the"
                " frame below map_partitions, or read it with pcm.read_parquet."
            )
        self.meta: pd.DataFrame = ddf._meta
        self.input_paths = list(_input_paths(ddf.expr))
        _check_names(ddf)

    def arrange(self, names: Sequence[str]) -> None:
        """Number the input's rows in another order of its files (their names in a manifest)."""
        if self.spans is None or self.reader is None:
            return
        first, n_rows = {}, 0
        paths = {name: path for path, name in names_of(self.reader.files).items()}
        for path in map(paths.__getitem__, names):
            first[path] = n_rows
            n_rows += self.reader.files[path].n_rows
        self.spans = [replace(s, offset=first[s.path] + s.start) for s in self.spans]

    def graph(self, unit: Unit) -> tuple[bytes, list[Any], list[Future]]:
        """Pickled tasks that compute a unit, the keys that they take as input, and those inputs.

        The pickle holds a ``Graph``. The rows to read are the key ``SPANS``, outside it, so one
        graph computes any rows of a frame that is splittable.
        """
        if not self.is_splittable:
            return self._graph(unit.partition)
        if self._any is None:
            self._any = self._graph(0)
        return self._any

    def _graph(self, partition: int) -> tuple[bytes, list[Any], list[Future]]:
        leaf = self._leaf
        if leaf is not None:
            # The reader's spans become a key that each unit fills in.
            given = {"iterables": [[TaskRef(SPANS)]], "_partitions": None}
            own = leaf.substitute_parameters(given)
        result = (self._top._name, partition)
        read: Any = None
        tasks: dict[Any, Task] = {}
        steps: dict[Any, Step] = {}
        needs: dict[Any, list[Any]] = {}
        outside: list[Any] = []
        todo = [result]
        while todo:
            key = todo.pop()
            expr = self._nodes.get(key[0])
            if expr is None:
                outside.append(key)
                continue
            if expr is leaf:
                tasks[key] = own._filtered_task(key, 0)
                read = key
            elif isinstance(expr, ContextMap):
                below = (expr.frame._name, key[1])
                steps[key] = Step(key, below, expr.operand("call"), expr.operand("refs"))
            else:
                tasks[key] = expr._task(key, key[1])
            needs[key] = [steps[key].below] if key in steps else list(tasks[key].dependencies)
            # Expressions may share inputs: each key is visited once.
            seen = {*needs, *outside, SPANS}
            todo += [k for k in needs[key] if k not in seen]
        order = TopologicalSorter(needs).static_order()
        ordered = tuple(steps[key] for key in order if key in steps)
        pickled = cloudpickle.dumps(Graph(tasks, ordered, result, read))
        return pickled, outside, [self._inputs[key] for key in outside]

    def start_below(self, client: Client) -> None:
        """Have Dask compute what is not blockwise, once; units take it as input."""
        if not self._below or self._inputs:
            return
        collections = [new_collection(below) for below in self._below.values()]
        # Matched by key: `futures_of` promises no order.
        for name, persisted in zip(self._below, client.persist(collections), strict=True):
            futures = {future.key: future for future in futures_of(persisted)}
            for index, key in enumerate(persisted.expr.operand("keys")):
                self._inputs[name, index] = futures[key]

    def extent(self) -> Extent:
        """The parts that the complete output may have."""
        rows = None
        if self.spans is not None:
            rows = Ranges((span.offset, span.offset + span.n_rows) for span in self.spans)
        return Extent(rows, self.n_partitions, self.keeps_rows)

    def close(self) -> None:
        """Release what Dask has computed as input of the units."""
        self._inputs.clear()

    def _find_leaf(self) -> Expr | None:
        leaves = [expr for expr in self._nodes.values() if not expr.dependencies()]
        if len(leaves) != 1 or self._below or "func" not in type(leaves[0])._parameters:
            return None
        return leaves[0] if isinstance(leaves[0].operand("func"), PieceReader) else None

    def _find_spans(self) -> list[Span] | None:
        if self._leaf is None:
            return None
        spans = self._leaf.operand("iterables")[0]
        picked = list(self._leaf._partitions)
        # Parts are named by the rows of the input, so a row can be in the output only once.
        if len(set(picked)) < len(picked):
            raise InputError(
                f"The frame picks partitions more than once ({picked[:8]}), so that their rows"
                " would be in the output only once. Pick each once."
            )
        return [spans[index] for index in picked]


def _divided(top: Expr) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """The blockwise expressions down from the top, and those that they take their input from."""
    blockwise: dict[str, Expr] = {}
    below: dict[str, Expr] = {}
    todo = [top]
    while todo:
        expr = todo.pop()
        if isinstance(expr, (Blockwise, ContextMap)):
            blockwise[expr._name] = expr
            todo += (e for e in expr.dependencies() if e._name not in blockwise)
        else:
            below[expr._name] = expr
    return blockwise, below


def _check_names(ddf: dd.DataFrame) -> None:
    """Raise SchemaError for names that Parquet columns cannot have."""
    names = [*ddf.columns, *([] if ddf.index.name is None else [ddf.index.name])]
    if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
        raise SchemaError(
            f"Columns (or the index) of the frame have the same name: {', '.join(repeated)}."
            " Rename them: in a Parquet file each name stands once."
        )
    if other := [name for name in names if not isinstance(name, str)]:
        raise SchemaError(
            f"Parquet columns are named by texts; found {other[:3]}. Rename them, for instance"
            " with frame.rename(columns=str)."
        )


def _input_paths(expr: Expr) -> Iterator[str]:
    """Files and folders that a frame reads."""
    for part in expr.walk():
        parameters = type(part)._parameters
        if "func" in parameters and isinstance(reader := part.operand("func"), PieceReader):
            yield from (*reader.roots, *reader.files)
        if "path" in parameters:
            paths = part.operand("path")
            paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
            yield from map(os.fspath, paths or ())


def _is_row_wise(expr: Expr) -> bool:
    if isinstance(expr, ContextMap):
        return expr.operand("batch_rows") is not None
    return isinstance(expr, (Elemwise, Filter))
