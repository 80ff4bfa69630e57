"""The task of a partition: it acquires the contexts and calls the user's function on its rows."""

from __future__ import annotations

import pandas as pd

from dask_pcm.context.context import ContextRef
from dask_pcm.context.sealed import Sealed
from dask_pcm.frames.caller import Caller
from dask_pcm.frames.failed_rows import ERROR
from dask_pcm.frames.shared import shared_calls
from dask_pcm.plugins.worker.first_batches import is_hopeless
from dask_pcm.plugins.worker.stats import Tally, TaskStats, unpack
from dask_pcm.plugins.worker.task import has_lane, was_lost
from dask_pcm.scheduling.rules.first_batches import N_BATCHES, Failing, Position


def infer(
    frame: pd.DataFrame,
    call: Sealed,
    refs: tuple[ContextRef, ...],
    position: Position | None = None,
) -> pd.DataFrame:
    """Run one task: acquire the contexts and call the function on `frame`.

    An empty partition acquires no context and calls nothing.

    Parameters
    ----------
    frame
        The rows of one partition.
    call
        The pickled ``Call``.
    refs
        The contexts to acquire, in the order of ``Call.names``.
    position
        Which partition of which Dask collection this is; None in a run, whose driver checks
        failures itself.

    Raises
    ------
    Exception
        The function's own exception, if it failed on all of the first rows of the collection.
    """
    caller = Caller(call, refs, TaskStats())
    opened, is_by_rows = caller.call, caller.call.batch_rows is not None
    if not len(frame):
        if is_by_rows and position is not None:
            # Record that this partition has no rows, so the check moves on to the next one.
            is_hopeless(position, Failing(0))
        return opened.meta.copy()

    def check(n_batches: int) -> None:
        if position is not None and n_batches == N_BATCHES:
            _check_hope(position, caller.tally)

    if _is_shared(caller, frame):
        parts = shared_calls(caller).results(caller, frame)
    else:
        parts = caller.results(frame, after=check, leaves_lane=True)
    # Outside the hold: the check may wait, and another lane can use the contexts meanwhile.
    if is_by_rows and position is not None and len(parts) < N_BATCHES:
        _check_hope(position, caller.tally)
    return opened.joined(parts)


def _is_shared(caller: Caller, frame: pd.DataFrame) -> bool:
    """Whether the rows are fewer than a batch, and the function is called by one task at a time."""
    call = caller.call
    if call.batch_rows is None or call.is_served or len(frame) >= call.batch_rows:
        return False
    # What was lost before may end its process again; then others should not be blamed.
    return any(ref.is_exclusive for ref in caller.refs) and has_lane() and not was_lost()


def _check_hope(position: Position, tally: Tally) -> None:
    """Raise the function's own exception if all of the collection's first rows failed with it."""
    failing = tally.failing
    if failing is not None and failing.n_batches and is_hopeless(position, failing):
        error = unpack(tally.error)
        error.add_note(
            "It ends the computation, because all of the first rows failed with it. If only these"
            " rows are bad, catch the exception in the function and return its text in the"
            f" column {ERROR!r}."
        )
        raise error
