"""One unit on a worker: ask the ledger, read, infer, commit."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dask_pcm.context.context import ContextRef
from dask_pcm.frames.call import ERROR
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.log import note_start
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import Note
from dask_pcm.ledger.suspects import Cost
from dask_pcm.plugins.worker.task import task_stats
from dask_pcm.runs.plan import Unit
from dask_pcm.runs.units.attempt import MAX_ERRORS, attempt, clear, grouped, make_record
from dask_pcm.runs.units.compute import chunks, compute
from dask_pcm.runs.units.schema import PartSchema
from dask_pcm.scheduling.rules.first_batches import Failing

#: Libraries whose versions a part names, where they were used.
_LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """What every unit of a run needs.

    Attributes
    ----------
    provenance
        What a part tells of its origin, besides what is found out while running.
    max_bytes
        Of input that is computed at a time, where rows can be computed apart; else 0.
    batch_rows
        Rows of one call, where rows can be computed apart; else 0.
    costs
        Processes that rows have cost in earlier runs.
    timeout_s
        What a call may take; None for no limit.
    """

    output: Output
    layout: PartSchema
    provenance: Mapping[str, Any]
    max_bytes: int = 0
    batch_rows: int = 0
    costs: tuple[Cost, ...] = ()
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What the driver learns of a unit.

    Attributes
    ----------
    n_rows, n_failed
        Rows of its part, and those among them with an error.
    n_kept
        Rows of its input that an earlier attempt had computed.
    infer_s, total_s
        Seconds that contexts were held, and all.
    is_resumed
        Whether the part was there already.
    errors
        A few of the errors.
    facts
        Where and how the contexts ran: device, dtype.
    failing, error
        Where no row succeeded, how they failed, and one exception packed.
    """

    name: str
    n_rows: int
    n_failed: int
    n_kept: int = 0
    infer_s: float = 0.0
    total_s: float = 0.0
    is_resumed: bool = False
    errors: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    failing: Failing | None = None
    error: bytes = field(default=b"", repr=False)


def run_unit(
    unit: Unit,
    graph: bytes,
    keys: Sequence[Any],
    inputs: Sequence[Any],
    job: UnitSpec,
    refs: tuple[ContextRef, ...],
) -> UnitResult:
    """The task of a unit; `refs` tell the gate what it needs.

    The ledger is asked first: a unit whose worker died after it committed comes again.
    """
    start = time.perf_counter()
    output = job.output
    there = output.read_note(unit.name) if output.storage.exists(unit.name) else {}
    if _is_answer(there, unit, output):
        return UnitResult(unit.name, there["rows"], there["failed"], is_resumed=True)
    task_stats.begin()
    count = _Count()
    if unit.again is None and job.batch_rows:
        origin = _origin(job)
        how = job.layout, job.batch_rows, job.max_bytes
        records = attempt(unit, graph, output, *how, origin, job.costs, job.timeout_s)
    else:
        if unit.again is None:
            note_start(output, unit.name, unit.n_rows)
        records = _whole(unit, graph, keys, inputs, job)
    tables = grouped(count.of(records))
    note: Note = lambda: {**_origin(job), **count.as_dict()}  # noqa: E731
    if unit.again:
        old, old_note = output.read_table(unit.name), output.read_note(unit.name)
        merged = _merged(old, tables, unit.again)
        retried = [*old_note.get("retried", []), {**_origin(job), **count.as_dict()}]
        counts = {"rows": len(merged), "failed": len(merged) - merged[ERROR].null_count}
        tables, note = iter([merged]), lambda: {**old_note, **counts, "retried": retried}
    with contextlib.closing(records):  # whatever comes: its journal is not to stay open
        output.commit(unit.name, tables, note, replaces=unit.again is not None)
    clear(unit.name, output)
    # What an earlier attempt had computed is not known to have failed alike.
    failing, error = (None, b"") if count.n_kept else task_stats.failing()
    return UnitResult(
        unit.name,
        count.n_rows,
        count.n_failed,
        count.n_kept,
        infer_s=task_stats.infer_s,
        total_s=time.perf_counter() - start,
        errors=tuple(count.errors[:MAX_ERRORS]),
        facts=count.facts,
        failing=failing,
        error=error,
    )


def _whole(
    unit: Unit, graph: bytes, keys: Sequence[Any], inputs: Sequence[Any], job: UnitSpec
) -> Generator[Record, None, None]:
    """What a unit comes to that leaves no journal: rows computed again, or a partition."""
    for chunk in chunks(unit, job.max_bytes):
        yield make_record(0, 0, compute(chunk, graph, keys, inputs), job.layout)


class _Count:
    """Rows as they pass, and their errors."""

    def __init__(self) -> None:
        self.n_rows = self.n_failed = self.n_kept = 0
        self.errors: list[str] = []
        self.facts: dict[str, str] = {}

    def of(self, records: Iterable[Record]) -> Iterator[pa.Table]:
        for record in records:
            self.n_rows += len(record.table)
            self.n_failed += record.n_failed
            self.n_kept += (record.stop - record.start) * record.is_kept
            self.errors += record.errors
            self.facts.update(record.facts)
            yield record.table

    def as_dict(self) -> dict[str, Any]:
        return {**self.facts, "rows": self.n_rows, "failed": self.n_failed}


def _origin(job: UnitSpec) -> dict[str, Any]:
    versions = _versions(job.provenance)
    return {**job.provenance, "run": job.output.run, "versions": versions}


def _is_answer(note: Mapping[str, Any], unit: Unit, output: Output) -> bool:
    """Whether a part with this note need not be computed any more."""
    if note.get("unit") != unit.name or not output.is_current(note):
        return False
    runs = {note.get("run"), *(again.get("run") for again in note.get("retried", ()))}
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
