"""One unit on a worker: ask the ledger, read, infer, commit."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from dask._task_spec import DataNode, execute_graph

from dask_pcm.context import ContextRef
from dask_pcm.ledger.layout import Layout
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import Note
from dask_pcm.ledger.plan import SPANS, Unit
from dask_pcm.mapping import ERROR
from dask_pcm.pieces import Span
from dask_pcm.plugins.hold import spent
from dask_pcm.reading import inflation

#: Libraries whose versions a part names, where they were used.
_LIBRARIES = ("torch", "transformers")
_MAX_ERRORS = 3
#: So many rows are computed first in a process that has not read any yet.
_PROBE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Job:
    """What every unit of a run needs.

    Attributes
    ----------
    provenance
        What a part tells of its origin, besides what is found out while running.
    max_bytes
        Of input that is computed at a time, where rows can be computed apart; else 0.
    """

    output: Output
    layout: Layout
    provenance: Mapping[str, Any]
    max_bytes: int = 0


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
    there = output.read_note(unit.name) if output.exists(unit.name) else {}
    if _is_answer(there, unit, output):
        return UnitResult(unit.name, there["rows"], there["failed"], is_resumed=True)
    if unit.again is None:
        output.note_start(unit.name, unit.n_rows)
    spent.begin()
    count = _Count()
    frames = count.of(compute(one, graph, keys, inputs) for one in chunks(unit, job.max_bytes))
    tables: Iterable[pa.Table] = (t for frame in frames for t in job.layout.tables(frame))
    note: Note = lambda: {**_origin(job), "unit": unit.name, **count.as_dict()}  # noqa: E731
    if unit.again:
        old, old_note = output.read_table(unit.name), output.read_note(unit.name)
        merged = _merged(old, tables, unit.again)
        retried = [*old_note.get("retried", []), {**_origin(job), **count.as_dict()}]
        counts = {"rows": len(merged), "failed": len(merged) - merged[ERROR].null_count}
        tables, note = [merged], lambda: {**old_note, **counts, "retried": retried}
    output.commit(unit.name, tables, note, replaces=unit.again is not None)
    return UnitResult(
        unit.name,
        count.n_rows,
        count.n_failed,
        infer_s=spent.infer_s,
        total_s=time.perf_counter() - start,
        errors=tuple(count.errors[:_MAX_ERRORS]),
        facts=dict(spent.facts),
    )


def chunks(unit: Unit, max_bytes: int) -> Iterator[Unit]:
    """A unit in pieces that fit in memory: rows may take more there than a file's footer tells.

    A text that stands in every row is stored once. So what rows really take is measured as they
    are read; a unit that is not to be split has no such bound.
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


class _Count:
    """Rows as they pass, and their errors."""

    def __init__(self) -> None:
        self.n_rows = self.n_failed = 0
        self.errors: list[str] = []

    def of(self, frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for frame in frames:
            # Where the reasons do not come through, the functions have told of them.
            failed = list(failures(frame)) if ERROR in frame.columns else spent.errors
            failed = failed if spent.is_by_rows else []
            self.n_rows += len(frame)
            self.n_failed += len(failed)
            self.errors += map(str, failed[:_MAX_ERRORS])
            yield frame

    def as_dict(self) -> dict[str, int]:
        return {"rows": self.n_rows, "failed": self.n_failed}


def _origin(job: Job) -> dict[str, Any]:
    versions = _versions(job.provenance)
    return {**job.provenance, **spent.facts, "run": job.output.run, "versions": versions}


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


def _is_answer(note: Mapping[str, Any], unit: Unit, output: Output) -> bool:
    """Whether a part with this note need not be computed any more."""
    if not note or not output.has_begun(note):
        return False
    runs = {note["run"], *(again["run"] for again in note.get("retried", ()))}
    return unit.again is None or output.run in runs


def _merged(old: pa.Table, tables: Iterable[pa.Table], again: Sequence[int]) -> pa.Table:
    """A part with the rows `again` replaced."""
    new = pa.concat_tables(tables).cast(old.schema)
    order = np.arange(len(old))
    order[list(again)] = len(old) + np.arange(len(new))
    return pa.concat_tables([old, new]).take(order)


def _versions(provenance: Mapping[str, Any]) -> dict[str, str]:
    used = {name: sys.modules[name] for name in _LIBRARIES if name in sys.modules}
    found = {name: str(getattr(module, "__version__", "?")) for name, module in used.items()}
    return {**provenance.get("versions", {}), **found}
