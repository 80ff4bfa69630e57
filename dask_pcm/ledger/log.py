"""The log of an output: what is noted there, and how it is read back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dask_pcm.ledger.log_lines import parse_line
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.ranges import Range, Ranges


def note_start(output: Output, unit: str, n_rows: int | None) -> None:
    """Note that a unit starts whose rows are computed as a whole.

    Units that are called by rows note the calls instead, see `note_called`.
    """
    output.storage.log.append({"run": output.run, "start": unit, "rows": n_rows})


def note_called(output: Output, rows: Iterable[Range], journal: str | None, run: str) -> None:
    """Note rows that an attempt of a run called the function on.

    Several attempts may read one journal before one removes it, and each notes its calls. So a
    line names its `journal`, and readers count each journal once.
    """
    if ranges := list(Ranges(rows)):
        output.storage.log.append({"run": run, "called": ranges, "journal": journal})


def read_lines(output: Output) -> Iterator[dict[str, Any]]:
    """All lines that were ever noted, in no particular order; damaged ones are skipped."""
    texts = output.storage.log.texts()
    return (line for line in map(parse_line, texts) if line is not None)
