"""A sample of rows, computed before a run to look at the answers and the cost."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Client

from dask_pcm.arguments import checked, frame_refused
from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import SchemaError
from dask_pcm.frames.failed_rows import ERROR
from dask_pcm.ledger.parts import range_name
from dask_pcm.parquet.reader import Span
from dask_pcm.plugins.install import current_client, install, is_installed
from dask_pcm.plugins.worker.stats import TaskStats, unpack
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.handle import output_to_look_at
from dask_pcm.runs.lost import cluster_errors_told
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.failure_limit import is_whole_number
from dask_pcm.runs.progress.stored import stored_progress
from dask_pcm.runs.units.compute import Computation, chunks
from dask_pcm.runs.units.graph import Unit
from dask_pcm.scheduling.rules.first_batches import Failing

_SEED = 0
_MAX_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Sample:
    """Answers to some rows of the input; nothing is committed.

    Attributes
    ----------
    frame
        The rows, in input order.
    n_rows, n_left
        Rows of the whole input, and those that are not in the output yet.
    n_failed, errors
        Rows of the sample with an error, and some of the errors.
    rows_per_s
        Rows per second on one device, without loading. Small samples understate it: first batches
        and small batches are slow.
    device_hours
        Hours that the rows that are left would take one device at that rate.
    total_s
        Wall time of the sample.
    """

    frame: pd.DataFrame
    n_rows: int
    n_left: int
    n_failed: int
    errors: tuple[str, ...]
    rows_per_s: float
    device_hours: float
    total_s: float

    def __str__(self) -> str:
        return (
            f"{len(self.frame):,} of {self.n_rows:,} rows, {self.n_failed:,} failed;"
            f" {self.rows_per_s:,.1f} rows/s a device, about {self.device_hours:,.2g} device-hours"
            f" for the {self.n_left:,} that are left"
        )

    def __repr__(self) -> str:
        return f"<Sample: {self}>"


@checked
def sample(
    ddf: dd.DataFrame,
    n_rows: int,
    *,
    output: str | os.PathLike[str] | None = None,
    client: Client | None = None,
) -> Sample:
    """Compute rows drawn at random, before a run, to look at the answers and the cost.

    The same rows are drawn every time. Nothing is written.

    Parameters
    ----------
    ddf
        What ``write_parquet`` would be given: over ``dask_pcm.read_parquet``, with functions by
        rows (``batch_rows``).
    n_rows
        Rows of the sample, at least 1; all rows if there are fewer.
    output
        An output that the job has begun: its rows do not count as left to do.
    client
        A client of the cluster; the current one if left out. The toolkit is installed on it.

    Raises
    ------
    SchemaError
        The frame's rows cannot be computed separately, or `n_rows` is no whole number from 1 on.
    OutputError
        The output is another job's.
    Exception
        What the function raised on every one of these rows.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise frame_refused("sample", ddf)
    client, plan = current_client(client), Plan(ddf)
    _check_sample(plan, n_rows)
    n_done = 0
    if output is not None:
        begun = output_to_look_at(output)
        mine = manifest.identify(ddf.expr, plan.is_splittable)
        if manifest.check(begun, mine, overwrite=False, extend=True) is not None:
            n_done = stored_progress(begun, None).done
    with cluster_errors_told(client, None):
        if not is_installed(client):
            install(client)
        return _draw(client, plan, n_rows, n_done)


def _check_sample(plan: Plan, n_rows: int) -> None:
    if not plan.is_splittable or plan.spans is None:
        raise SchemaError(
            "A sample needs rows that can be computed separately: a frame of"
            " pcm.read_parquet, and functions by rows (batch_rows=...)."
        )
    if not is_whole_number(n_rows) or n_rows < 1:
        raise SchemaError(f"A sample has a number of rows, at least 1; found {n_rows!r}.")


def _draw(client: Client, plan: Plan, n_rows: int, n_done: int) -> Sample:
    """Compute `n_rows` rows; `n_done` rows of the input are in the output already."""
    start = time.monotonic()  # in the keys, too: Dask must not answer from an earlier sample
    units = list(_units(plan, n_rows, len(client.nthreads())))
    keys = [f"{plan.label}_sample-{start}-{number}" for number in range(len(units))]
    futures = [
        client.submit(_answer, unit, plan.graph(unit)[0], plan.refs, key=key)
        for unit, key in zip(units, keys, strict=True)
    ]
    found = client.gather(futures)
    _raise_if_all_failed(found)
    frame = pd.concat([answer.frame for answer in found]) if found else plan.meta
    busy_s = sum(answer.seconds for answer in found)
    n_asked = sum(unit.n_rows or 0 for unit in units)
    rows_per_s = n_asked / max(1e-9, busy_s)
    failed = frame.get(ERROR, pd.Series([], dtype="str")).dropna()
    n_left = plan.n_rows - n_done
    return Sample(
        frame,
        plan.n_rows,
        n_left,
        len(failed),
        tuple(map(str, failed.value_counts().index[:_MAX_ERRORS])),
        rows_per_s,
        n_left / rows_per_s / 3600 if n_asked else 0.0,
        time.monotonic() - start,
    )


def _units(plan: Plan, n_rows: int, n_workers: int) -> list[Unit]:
    """Rows drawn without replacement, in input order, a share for each worker."""
    assert plan.spans is not None
    n_rows = min(n_rows, plan.n_rows)
    drawn = np.sort(np.random.default_rng(_SEED).choice(plan.n_rows, n_rows, replace=False))
    ends = np.cumsum([span.n_rows for span in plan.spans])
    pieces = np.searchsorted(ends, drawn, side="right")
    rows: list[Span] = []
    for number, piece in zip(drawn.tolist(), pieces.tolist(), strict=True):
        span = plan.spans[piece]
        within = number - (int(ends[piece]) - span.n_rows)
        rows.append(span.cut(within, within + 1))
    # At least a batch each: smaller calls would understate the rate.
    n_each = max(plan.batch_rows, -(-n_rows // max(1, n_workers)))
    name = range_name(0, 0)
    shares = (rows[at : at + n_each] for at in range(0, len(rows), n_each))
    return [Unit(name, 0, tuple(share), len(share)) for share in shares]


class _Answer(NamedTuple):
    """Rows of one unit, their seconds, and how they failed if none succeeded."""

    frame: pd.DataFrame
    seconds: float
    failing: Failing | None
    error: bytes


def _raise_if_all_failed(found: Sequence[_Answer]) -> None:
    """Raise what every row raised, if they all raised the same type."""
    kinds = {answer.failing.kind if answer.failing else None for answer in found}
    packed = [answer.error for answer in found if answer.error]
    if packed and len(kinds) == 1:
        raise unpack(packed[0])


def _answer(unit: Unit, graph: bytes, refs: Sequence[ContextRef]) -> _Answer:
    stats = TaskStats()
    computation = Computation(graph, stats)
    start = time.perf_counter()
    outcomes = [computation.whole(some) for some in chunks(unit, Config.read().unit_bytes)]
    frame = pd.concat([frame for outcome in outcomes for frame in outcome.frames])
    return _Answer(frame, stats.held_s or time.perf_counter() - start, *stats.failing())
