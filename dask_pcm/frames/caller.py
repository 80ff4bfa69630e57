"""A task calls the user's function on its rows, and holds the contexts meanwhile.

With ``batch_rows`` the function is called on one batch at a time. If a batch raises, it is
bisected until the failing rows are alone; their ``error`` column holds the exception, and the other
rows of the batch are unaffected.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import pandas as pd

from dask_pcm.context.context import ContextRef
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import PCMError
from dask_pcm.frames.call import Call
from dask_pcm.frames.failed_rows import ERROR, failed_row, with_error
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.ladder.residency import Drafting
from dask_pcm.plugins.worker.deadline import in_time
from dask_pcm.plugins.worker.first_batches import is_hopeless
from dask_pcm.plugins.worker.stats import Tally, TaskStats, unpack
from dask_pcm.plugins.worker.task import attendants, hand_over, hold
from dask_pcm.scheduling.rules.first_batches import N_BATCHES, Failing, Position

T = TypeVar("T")


class Watch(Protocol):
    """Sees what is about to happen to the rows of a frame."""

    def waits(self) -> None:
        """The task waits for its contexts. No row is computed until `calls` follows."""

    def calls(self, start: int, stop: int, n_rows: int) -> None:
        """The function is about to be called on rows ``start:stop`` of a frame of `n_rows`."""


@dataclass(frozen=True, slots=True)
class Submission(Generic[T]):
    """A batch that was begun.

    Attributes
    ----------
    result
        Waits for its results, and returns them; for the thread that submitted it.
    future
        What is waited for; None if the results are there.
    """

    result: Callable[[], T]
    future: Future[Any] | None = None


class Caller:
    """Calls one function in one task, and holds its contexts meanwhile; for the task's thread.

    Parameters
    ----------
    sealed
        The pickled ``Call``.
    refs
        The contexts to acquire, in the order of ``Call.names``.
    stats
        Collects what the task does.
    """

    def __init__(self, sealed: Sealed, refs: Sequence[ContextRef], stats: TaskStats) -> None:
        self.call: Call = sealed.open()
        self._refs = [replace(ref, is_exclusive=False) for ref in refs]
        if not self.call.is_served:  # what serves many at once knows no turns
            self._refs = list(refs)
        self._stats = stats
        self.tally = Tally()
        if self.call.batch_rows is not None:
            self.tally = stats.tallies.setdefault(sealed.digest, self.tally)
        #: The contexts of a function that is served; held from the first batch to ``close``.
        self._held: list[Any] | None = None
        self._is_attended = False
        self._drafts: Mapping[int, Sequence[int]] = {}
        #: Of batches that are served and have not ended.
        self._in_flight: set[Future[Any]] = set()
        self._stack = ExitStack()

    def close(self, *raised: Any) -> None:
        """Let go of contexts that are held for batches in flight; `raised` as for ``__exit__``.

        Batches that are in flight still, as the task ends early, are cancelled.
        """
        self._cancel()
        for one in self._drafting() if self._drafts else ():
            one.resume({})
        self._held = None
        self._stack.__exit__(*(raised or (None, None, None)))

    @property
    def is_attended(self) -> bool:
        """Whether all contexts that are held for batches in flight have attendants."""
        return self._is_attended

    def resume(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Have batches that are submitted go on from drafts of an earlier attempt."""
        self._drafts = drafts

    def drafts(self) -> dict[int, list[int]]:
        """Drafts of what is in flight; see ``Drafting``."""
        return {key: draft for one in self._drafting() for key, draft in one.drafts().items()}

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until attendants accept a batch at once; False if that takes longer."""
        return all(one.wait_for_room(timeout_s) for one in self._drafting())

    def _drafting(self) -> list[Drafting]:
        return [one for one in self._held or () if isinstance(one, Drafting)]

    def results(
        self,
        frame: pd.DataFrame,
        watch: Watch | None = None,
        after: Callable[[int], None] = lambda _: None,
        leaves_lane: bool = False,
    ) -> list[pd.DataFrame]:
        """Call the function on `frame`, ``batch_rows`` rows at a time; hold the contexts meanwhile.

        Parameters
        ----------
        after
            Called with the number of batches that are done, after each.
        leaves_lane
            Whether the task leaves its lane to others while attendants serve its rows.

        Returns
        -------
        list of pandas.DataFrame
            The results, by batch; by rows, each is checked and on its rows' index.
        """
        if not len(frame):
            return [self.call.meta.copy()]
        cut = self._cut(frame)  # before the contexts are held: other lanes wait for them
        found = []
        if watch is not None:
            watch.waits()
        with hold(self._refs, self._stats) as contexts:
            live = contexts
            if self.call.is_served:
                contexts = attendants(self._refs, live)
            if self.call.batch_rows is None:
                return [self.call.on(frame, contexts)]
            start = 0
            begun: list[Callable[[], Any]] = []
            for rows in cut:
                if watch is not None:
                    watch.calls(start, start + len(rows), len(frame))
                start += len(rows)
                if self.call.is_served:
                    begun.append(self._begun(rows, contexts).result)
                    continue
                self.tally.begin_batch()
                found.append(self._batch(rows, contexts))
                after(len(found))
            is_attended = all(a is not b for a, b in zip(contexts, live, strict=True))
            if begun and leaves_lane and is_attended:  # its rows share steps with those of others
                hand_over(len(frame))
            try:
                for result in begun:
                    with in_time(self.call.timeout_s):
                        found.append(result())
                    after(len(found))
            finally:
                self._cancel()  # what is in flight, if one has raised
        # After the contexts are released: checks would delay the next call of another lane.
        pairs = zip(cut, found, strict=True)
        return [self.call.one_for_each(rows, result) for rows, result in pairs]

    def submit(
        self, frame: pd.DataFrame, watch: Watch, is_alone: bool = False
    ) -> Submission[list[pd.DataFrame]]:
        """Begin a batch of a function that is served; `frame` has rows.

        Parameters
        ----------
        is_alone
            Whether attendants serve nothing else meanwhile; then its results are waited for.
        """
        if self._held is None:
            # Held until the unit ends: a batch may be in flight at any moment from now on.
            watch.waits()
            values = self._stack.enter_context(hold(self._refs, self._stats))
            self._held = attendants(self._refs, values)
            pairs = zip(self._held, values, strict=True)
            self._is_attended = all(serves is not value for serves, value in pairs)
            for one in self._drafting() if self._drafts else ():
                one.resume(self._drafts)
        with ExitStack() as alone:
            for serves in self._held if is_alone and self._is_attended else ():
                alone.enter_context(serves.alone())
            watch.calls(0, len(frame), len(frame))
            begun = self._begun(frame, self._held)
            if is_alone and begun.future is not None:
                with in_time(self.call.timeout_s):
                    concurrent.futures.wait([begun.future])
        collect = lambda: [self.call.one_for_each(frame, begun.result())]  # noqa: E731
        return Submission(collect, begun.future)

    def _begun(self, frame: pd.DataFrame, contexts: Sequence[Any]) -> Submission[Any]:
        """Begin a batch of a function that is served; its result is not checked."""
        self.tally.begin_batch()
        future: Future[pd.DataFrame]
        try:
            with in_time(self.call.timeout_s):  # it may wait for room
                future = self.call.submit(frame.copy(deep=False), contexts)
            self._in_flight.add(future)
            future.add_done_callback(self._in_flight.discard)
        except Exception as error:  # its rows are isolated like those of a batch that fails later
            future = Future()
            future.set_exception(error)

        def result() -> Any:
            with self.call.raising():
                return future.result()

        return Submission(lambda: self._batch(frame, contexts, result), future)

    def _cancel(self) -> None:
        for future in list(self._in_flight):
            future.cancel()

    def failed(self, frame: pd.DataFrame, error: Exception) -> list[pd.DataFrame]:
        """The results if all rows fail with `error`, without a call of the function."""
        self.tally.begin_batch()
        self.tally.succeed()
        rows = [frame.iloc[at : at + 1] for at in range(len(frame))]
        meta = self.call.meta
        return [pd.concat([self.call.cast(failed_row(row, meta, error)) for row in rows])]

    def _cut(self, frame: pd.DataFrame) -> list[pd.DataFrame]:
        """The rows of each call."""
        size = self.call.batch_rows
        if size is None or len(frame) <= size:
            return [frame]
        return [frame.iloc[at : at + size] for at in range(0, len(frame), size)]

    def _batch(
        self,
        frame: pd.DataFrame,
        contexts: Sequence[Any],
        compute: Callable[[], Any] | None = None,
    ) -> Any:
        """Call the function on one batch; if it raises, bisect down to the failing rows.

        What it returned is not checked, except after a bisection.
        """
        try:
            result = self.call.on(frame, contexts) if compute is None else compute()
        except PCMError:
            raise
        except Exception as error:
            # A sticky device error fails every later call in this process; bisecting would blame
            # rows that are fine.
            if is_sticky(error):
                raise
            if len(frame) == 1:
                self.tally.fail(frame, error)
                return self.call.cast(failed_row(frame, self.call.meta, error))
        else:
            self.tally.succeed()
            return result
        # Outside the except block: errors of the halves must not be chained to this one.
        half = len(frame) // 2
        parts = [
            self.call.one_for_each(rows, self._batch(rows, contexts))
            for rows in (frame.iloc[:half], frame.iloc[half:])
        ]
        # Cast before concatenating: pandas would turn integers and nulls into rounded floats.
        return pd.concat([self.call.enforced(with_error(part)) for part in parts])


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

    parts = caller.results(frame, after=check, leaves_lane=True)
    # Outside the hold: the check may wait, and another lane can use the contexts meanwhile.
    if is_by_rows and position is not None and len(parts) < N_BATCHES:
        _check_hope(position, caller.tally)
    return opened.joined(parts)


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
