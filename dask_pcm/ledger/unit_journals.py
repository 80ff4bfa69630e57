"""The journals of an output: one per attempt at a unit, found by the unit's name."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from dask_pcm.ledger.journal.reader import Found, read_journal
from dask_pcm.ledger.journal.writer import Journal
from dask_pcm.ledger.layout import JOURNAL
from dask_pcm.ledger.output import Output


def begin_journal(output: Output, unit: str, origin: Mapping[str, Any]) -> Journal:
    """Create a journal for an attempt at a unit.

    `origin` is what a part made of the journal would note about where it comes from.

    Raises
    ------
    FencedError
        If a newer run has taken over this output.
    """
    # Several attempts of one run can be alive at once: Dask may compute a task again while a
    # worker that it has lost still runs it.
    name = f"{JOURNAL}/{unit}.{output.run}.{uuid.uuid4().hex}"
    about = {**origin, "run": output.run, "begun": output.generation, "unit": unit}
    return output.storage.open_journal(name, about)


def journal_names(output: Output, unit: str | None = None) -> list[str]:
    """Names of the journals that attempts at a unit have left; at any unit by default."""
    names = (name.rstrip("/") for name in output.storage.entries(JOURNAL))
    return [f"{JOURNAL}/{n}" for n in names if unit is None or n.startswith(f"{unit}.")]


def read_journals(output: Output, unit: str | None = None) -> Iterator[tuple[str, Found | None]]:
    """Read those journals; yield name and content, None if it is of no use."""
    for name in journal_names(output, unit):
        # An attempt that has committed meanwhile removes its journal.
        with contextlib.suppress(FileNotFoundError):
            found = read_journal(output.storage.read_journal(name))
            is_ours = found is not None and output.is_current(found.about)
            own = name.removeprefix(f"{JOURNAL}/")
            yield name, found if found and is_ours and found.is_named(own) else None
