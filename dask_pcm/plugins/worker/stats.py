"""What one task has done: times, facts of its contexts, and how its functions failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_pcm.plugins.worker.tally import Tally
from dask_pcm.scheduling.rules.first_batches import Failing


@dataclass(slots=True)
class TaskStats:
    """Collected along one task and passed on with its result; for the task's thread.

    Attributes
    ----------
    waited_s, held_s
        Seconds for which it waited for contexts, and held them.
    facts
        The contents of the live objects' ``facts`` mappings: device, dtype.
    tallies
        Failures of the row-wise functions, by the functions' digests.
    """

    waited_s: float = 0.0
    held_s: float = 0.0
    facts: dict[str, str] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def note_facts(self, values: Iterable[Any]) -> None:
        """Add the facts of live objects."""
        for value in values:
            if isinstance(facts := getattr(value, "facts", None), Mapping):
                self.facts.update(facts)

    def failing(self) -> tuple[Failing | None, bytes]:
        """How a function failed on all rows, and its packed exception.

        None if no function did; 0 batches if none ran.
        """
        for tally in self.tallies.values():
            if (failing := tally.failing) is not None:
                return failing, tally.error
        return None if self.tallies else Failing(0), b""
