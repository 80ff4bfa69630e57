"""What a unit's task is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_pcm.ledger.output import Output
from dask_pcm.ledger.suspects import Cost
from dask_pcm.runs.units.schema import PartSchema
from dask_pcm.scheduling.rules.first_batches import Failing


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """What every unit of a run needs.

    Attributes
    ----------
    provenance
        What a part says of its origin, besides what is found out while running.
    max_bytes
        Input that is computed at a time, where units have any rows; else 0.
    batch_rows
        Rows per call, where units have any rows; else 0.
    costs
        Processes that rows have cost in earlier runs.
    timeout_s
        Limit of a call, in seconds; None for no limit.
    """

    output: Output
    schema: PartSchema
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
        Rows of its part, and those with an error.
    n_kept
        Rows of its input that an earlier attempt had computed.
    infer_s, total_s
        Seconds that contexts were held, and of the whole task.
    is_resumed
        Whether the part was committed already.
    errors
        A few of the errors.
    facts
        Where and how the contexts ran: device, dtype.
    failing, error
        How the rows failed, and one exception packed; None and empty if any succeeded.
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
