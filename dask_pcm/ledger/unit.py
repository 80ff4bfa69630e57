"""One unit on a worker: ask the ledger, read, infer, commit."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from dask._task_spec import DataNode, execute_graph

from dask_pcm.context import ContextRef
from dask_pcm.ledger.layout import Layout
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.plan import SPANS, Unit
from dask_pcm.mapping import ERROR
from dask_pcm.plugins.hold import spent

#: Libraries whose versions a part names, where they were used.
_LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class Job:
    """What every unit of a run needs.

    Attributes
    ----------
    provenance
        What a part tells of its origin, besides what is found out while running.
    """

    output: Output
    layout: Layout
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What the driver learns of a unit.

    Attributes
    ----------
    n_rows, n_failed
        Rows that were computed, and those among them with an error.
    infer_s, total_s
        Seconds that contexts were held, and all.
    is_resumed
        Whether the part was there already.
    errors
        A few of the errors.
    facts
        Where and how the contexts ran: device, dtype.
    """

    name: str
    n_rows: int
    n_failed: int
    infer_s: float = 0.0
    total_s: float = 0.0
    is_resumed: bool = False
    errors: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def run_unit(
    unit: Unit,
    graph: bytes,
    keys: Sequence[Any],
    inputs: Sequence[Any],
    job: Job,
    refs: tuple[ContextRef, ...],
) -> UnitResult:
    """The task of a unit; `refs` tell the gate what it needs.

    The ledger is asked first: a unit whose worker died after it committed comes again.
    """
    start = time.perf_counter()
    output = job.output
    if (there := _there(output, unit)) is not None:
        return UnitResult(unit.name, there["rows"], there["failed"], is_resumed=True)
    if unit.again is None:
        output.note_start(unit.name, unit.n_rows)
    spent.begin()
    frame = compute(unit, graph, keys, inputs)
    failed = failures(frame)
    counts = {"rows": len(frame), "failed": len(failed)}
    tables = job.layout.tables(frame)
    if unit.again:
        merged, n_failed = _merged(output.read_table(unit.name), tables, unit.again)
        tables, counts = iter([merged]), {"rows": len(merged), "failed": n_failed}
    origin = {**job.provenance, **spent.facts, "versions": _versions(job.provenance)}
    note = {"run": output.run, "unit": unit.name, **counts, **origin}
    output.commit(unit.name, tables, note, replaces=unit.again is not None)
    return UnitResult(
        unit.name,
        len(frame),
        len(failed),
        infer_s=spent.infer_s,
        total_s=time.perf_counter() - start,
        errors=tuple(map(str, failed.head(3))),
        facts=dict(spent.facts),
    )


def compute(
    unit: Unit, graph: bytes, keys: Sequence[Any] = (), inputs: Sequence[Any] = ()
) -> pd.DataFrame:
    """The rows of a unit, from its pickled graph and what it takes from outside."""
    tasks, result = _opened(graph)
    given = {SPANS: unit.spans, **dict(zip(keys, inputs, strict=True))}
    tasks = {**tasks, **{key: DataNode(key, value) for key, value in given.items()}}
    frame: pd.DataFrame = execute_graph(tasks, keys=[result])[result]
    return frame


@lru_cache(maxsize=16)
def _opened(graph: bytes) -> Any:
    return pickle.loads(graph)  # the same for every unit of a run by rows


def failures(frame: pd.DataFrame) -> pd.Series:
    """The errors in a frame."""
    return frame[ERROR].dropna() if ERROR in frame.columns else pd.Series([], dtype="str")


def _there(output: Output, unit: Unit) -> dict[str, Any] | None:
    """The note of a part that need not be computed any more."""
    if not output.exists(unit.name):
        return None
    note = output.read_note(unit.name)
    return note if unit.again is None or note["run"] == output.run else None


def _merged(
    old: pa.Table, tables: Iterator[pa.Table], again: Sequence[int]
) -> tuple[pa.Table, int]:
    """A part with the rows `again` replaced, and how many of all its rows failed."""
    new = pa.concat_tables(tables).cast(old.schema)
    order = np.arange(len(old))
    order[list(again)] = len(old) + np.arange(len(new))
    merged = pa.concat_tables([old, new]).take(order)
    return merged, len(merged) - merged[ERROR].null_count


def _versions(provenance: Mapping[str, Any]) -> dict[str, str]:
    used = {name: sys.modules[name] for name in _LIBRARIES if name in sys.modules}
    found = {name: str(getattr(module, "__version__", "?")) for name, module in used.items()}
    return {**provenance.get("versions", {}), **found}
