"""The log of an output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dask_pcm.ledger.log_lines import parse_line
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.ranges import Range, Ranges


def note_start(output: Output, unit: str, n_rows: int | None) -> None:
    """Note that a unit begins whose rows are computed as a whole."""
    output.storage.log.append({"run": output.run, "start": unit, "rows": n_rows})


def note_called(output: Output, rows: Iterable[Range], journal: str | None, run: str) -> None:
    """Note rows that a function by rows was called on, by an attempt of a run.

    What the same journal tells counts once, however many note it.
    """
    if ranges := list(Ranges(rows)):
        output.storage.log.append({"run": run, "called": ranges, "journal": journal})


def read_lines(output: Output) -> Iterator[dict[str, Any]]:
    """Everything that was ever noted here, in no order; damaged lines are left out."""
    texts = output.storage.log.texts()
    return (line for line in map(parse_line, texts) if line is not None)
