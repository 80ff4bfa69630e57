"""The task of a unit, on a worker: ask the ledger, read, infer, commit."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dask_pcm.context.context import ContextRef
from dask_pcm.frames.failed_rows import ERROR
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.log import note_start
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import Note
from dask_pcm.plugins.worker.stats import TaskStats
from dask_pcm.runs.units.attempt import attempt, grouped
from dask_pcm.runs.units.compute import Computation, chunks
from dask_pcm.runs.units.flight import MAX_ERRORS, make_record
from dask_pcm.runs.units.graph import Unit
from dask_pcm.runs.units.history import clear_journals
from dask_pcm.runs.units.unit import UnitResult, UnitSpec

#: Libraries whose versions a part names, where they were used.
_LIBRARIES = ("torch", "transformers")


def run_unit(
    unit: Unit,
    graph: bytes,
    keys: Sequence[Any],
    inputs: Sequence[Any],
    spec: UnitSpec,
    refs: tuple[ContextRef, ...],
) -> UnitResult:
    """Compute a unit and commit its part; `refs` tell the gate which contexts it needs.

    Asks the ledger first: a unit whose worker died after the commit is run again.
    """
    start = time.perf_counter()
    output = spec.output
    there = output.read_note(unit.name) if output.storage.exists(unit.name) else {}
    if _is_answer(there, unit, output):
        return UnitResult(unit.name, there["rows"], there["failed"], is_resumed=True)
    stats, count = TaskStats(), _Count()
    computation = Computation(graph, stats, dict(zip(keys, inputs, strict=True)))
    if unit.retry is None and spec.batch_rows:
        records = attempt(unit, computation, spec, _origin(spec))
    else:
        if unit.retry is None:
            note_start(output, unit.name, unit.n_rows)
        records = _whole(unit, computation, spec)
    tables = grouped(records, count.add)
    note: Note = lambda: {**_origin(spec), **count.as_dict()}  # noqa: E731
    if unit.retry:
        old, old_note = output.read_table(unit.name), output.read_note(unit.name)
        merged = _merged(old, tables, unit.retry)
        retried = [*old_note.get("retried", []), {**_origin(spec), **count.as_dict()}]
        counts = {"rows": len(merged), "failed": len(merged) - merged[ERROR].null_count}
        tables, note = iter([merged]), lambda: {**old_note, **counts, "retried": retried}
    with contextlib.closing(records):  # closes the journal, even if the commit fails
        # The first row group, in most units all rows, is computed before the part is begun.
        tables = itertools.chain([next(tables)], tables)
        output.commit(unit.name, tables, note, replaces=unit.retry is not None)
    clear_journals(unit.name, output, computation.has_drafts)
    # How rows failed in an earlier attempt is unknown here.
    failing, error = (None, b"") if count.n_kept else stats.failing()
    return UnitResult(
        unit.name,
        count.n_rows,
        count.n_failed,
        count.n_kept,
        infer_s=stats.held_s,
        total_s=time.perf_counter() - start,
        errors=tuple(count.errors[:MAX_ERRORS]),
        facts=count.facts,
        failing=failing,
        error=error,
    )


def _whole(unit: Unit, computation: Computation, spec: UnitSpec) -> Generator[Record, None, None]:
    """Records of a unit without a journal: rows computed again, or a partition."""
    for chunk in chunks(unit, spec.max_bytes):
        outcome = computation.whole(chunk)
        yield make_record(0, 0, outcome, spec.schema, computation.stats.facts)


class _Count:
    """Counts the rows of records."""

    def __init__(self) -> None:
        self.n_rows = self.n_failed = self.n_kept = 0
        self.errors: list[str] = []
        self.facts: dict[str, str] = {}

    def add(self, record: Record) -> None:
        """Count a record, whose rows are about to be written."""
        self.n_rows += len(record.table)
        self.n_failed += record.n_failed
        self.n_kept += (record.stop - record.start) * record.is_kept
        self.errors += record.errors
        self.facts.update(record.facts)

    def as_dict(self) -> dict[str, Any]:
        """The counts and facts that a part's note has."""
        return {**self.facts, "rows": self.n_rows, "failed": self.n_failed}


def _origin(spec: UnitSpec) -> dict[str, Any]:
    versions = _versions(spec.provenance)
    return {**spec.provenance, "run": spec.output.run, "versions": versions}


def _is_answer(note: Mapping[str, Any], unit: Unit, output: Output) -> bool:
    """Whether the part with this note is what the unit would compute."""
    if note.get("unit") != unit.name or not output.is_current(note):
        return False
    runs = {note.get("run"), *(again.get("run") for again in note.get("retried", ()))}
    return unit.retry is None or output.run in runs


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
