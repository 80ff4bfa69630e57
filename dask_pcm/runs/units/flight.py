"""The batches of a unit in flight: begun, waited for, and journalled when they are finished."""

from __future__ import annotations

import concurrent.futures
import heapq
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
from distributed import Reschedule

from dask_pcm.errors import LostProcessError
from dask_pcm.frames.caller import Submission
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.suspects import N_TRIES, Suspects
from dask_pcm.plugins.worker.deadline import in_time
from dask_pcm.plugins.worker.task import hand_over, stops_at
from dask_pcm.runs.units.calls import Calls, stop_in_time
from dask_pcm.runs.units.compute import Batch, Computation, Outcome
from dask_pcm.runs.units.pace import Pace
from dask_pcm.runs.units.schema import PartSchema
from dask_pcm.runs.units.unit import UnitSpec

#: Errors of each batch that are reported.
MAX_ERRORS = 3
#: Seconds between two records of drafts: what a killed process computes again of a long text.
DRAFT_S = 5.0
#: Seconds after which a task that waits looks whether drafts are due, and before the end of its
#: worker at which it leaves with them.
_POLL_S, _LEAVE_S = 1.0, 2.0


class Flight:
    """The batches of a unit that are begun and not finished; for the task's thread."""

    def __init__(self, computation: Computation, spec: UnitSpec, calls: Calls, pace: Pace) -> None:
        self._computation = computation
        self._spec = spec
        self._calls = calls
        self._pace = pace
        #: Begun batches: when, and what waits for them.
        self._begun: dict[int, tuple[Batch, float, Submission[Outcome]]] = {}
        self._kept_at = time.monotonic()
        #: Finished, but after one that is not; by first row.
        self._finished: list[tuple[int, Record]] = []

    def records(self, todo: Iterable[Batch]) -> Iterator[Record]:
        """Compute batches; yield their records in input order, each journalled when it is done.

        Raises
        ------
        Reschedule
            If the worker is about to end, and the next batch would not be done by then.
        """
        for batch in todo:
            is_suspect = self._pace.suspects.include(batch.start)
            if is_suspect:  # alone: only then do its rows, and no others, pay for a process death
                yield from self._drain()
            try:
                stop_in_time(self._pace)
                self._wait_for_room()
                self._begin(batch, is_suspect)
            except Reschedule:
                yield from self._drain()
                raise
            yield from self._drain() if is_suspect else self._collect(is_waiting=False)
        if self._begun and self._computation.is_attended:  # its lane is free for another unit
            hand_over(sum(batch.stop - batch.start for batch, *_ in self._begun.values()))
        yield from self._drain()

    def _drain(self) -> Iterator[Record]:
        while self._begun:
            yield from self._collect(is_waiting=True)
        yield from self._collect(is_waiting=False)

    def _begin(self, batch: Batch, is_alone: bool) -> None:
        if self._pace.suspects.gives_up(batch.start):
            outcome = _given_up(batch, self._computation, self._spec, self._pace.suspects)
            self._finish(batch, outcome)
            return
        begun = time.perf_counter()
        watch = self._calls.begin(batch, self._pace)
        submission = self._computation.submit(batch, watch, is_alone)
        self._begun[batch.start] = batch, begun, submission

    def _collect(self, is_waiting: bool) -> Iterator[Record]:
        """Finish the batches that are done; wait for the first one, if told to."""
        futures = [one.future for *_, one in self._begun.values() if one.future is not None]
        if is_waiting and len(futures) == len(self._begun):
            with in_time(self._computation.timeout_s):
                self._wait(futures)
        self._finish_done()
        # Parts have their rows in input order; what is finished early waits, journalled already.
        first = min(self._begun, default=math.inf)
        while self._finished and self._finished[0][0] < first:
            yield heapq.heappop(self._finished)[1]

    def _finish_done(self) -> None:
        """Journal the batches that are done, and drafts of others if they are due."""
        for start, (batch, begun, submission) in list(self._begun.items()):
            if submission.future is None or submission.future.done():
                outcome = submission.result()
                del self._begun[start]
                self._finish(batch, outcome)
                if submission.future is None:  # what is served has several batches in flight
                    self._pace.observe(start, time.perf_counter() - begun)
        if self._begun:
            self._keep_drafts()

    def _wait_for_room(self) -> None:
        """Wait until the next batch is accepted, within the time limit of a batch."""
        with in_time(self._computation.timeout_s):
            while self._begun and not self._computation.wait_for_room(_POLL_S):
                self._finish_done()

    def _wait(self, futures: list[Future[Any]]) -> None:
        """Wait for one of those in flight to end; drafts are kept meanwhile.

        Raises
        ------
        Reschedule
            The worker is about to end. What is in flight goes on from its drafts elsewhere.
        """
        pause_s = _POLL_S if self._computation.has_drafts else None
        done: set[Any] = set()
        while not done:
            done, _ = concurrent.futures.wait(
                futures, pause_s, return_when=concurrent.futures.FIRST_COMPLETED
            )
            if not done:
                self._keep_drafts()

    def _keep_drafts(self) -> None:
        """Journal what rows in flight have by now, every few seconds; see ``_wait``."""
        now = time.monotonic()
        is_over = now + _LEAVE_S > stops_at()
        if self._computation.has_drafts and (is_over or now - self._kept_at >= DRAFT_S):
            self._calls.keep(self._computation.drafts())
            self._kept_at = now
            if is_over:
                raise Reschedule

    def _finish(self, batch: Batch, outcome: Outcome) -> None:
        schema, facts = self._spec.schema, self._computation.stats.facts
        record = make_record(batch.start, batch.stop, outcome, schema, facts)
        self._calls.finish(record)
        heapq.heappush(self._finished, (batch.start, record))


def _given_up(
    batch: Batch, computation: Computation, spec: UnitSpec, suspects: Suspects
) -> Outcome:
    """A row that fails without being computed.

    It is not journalled as begun: should the rest of its work end a process as well, the row is
    not charged again; the gate counts the death, and ends the task after too many.
    """
    timeout_s = spec.timeout_s
    causes = "killed for its memory, or by a crash of native code"
    causes += "" if timeout_s is None else ", or because it took longer than batch_timeout"
    what = f"the worker process ended {N_TRIES} times while it was computed alone ({causes})"
    if suspects.is_late(batch.start) and timeout_s is not None:
        what = f"took longer than batch_timeout ({timeout_s:g} s), computed alone"
    error = LostProcessError(
        f"Row {batch.start:,} of the input: {what}. What the workers logged may say more."
    )
    return computation.failed(batch, error)


def make_record(
    start: int, stop: int, outcome: Outcome, schema: PartSchema, facts: Mapping[str, str]
) -> Record:
    """The record of input rows that this task has just computed."""
    cast = outcome.call.cast_column if outcome.call is not None else None
    tables = [table for frame in outcome.frames for table in schema.tables(frame, cast)]
    errors = [str(error) for error in outcome.errors[:MAX_ERRORS]]
    return Record(start, stop, pa.concat_tables(tables), len(outcome.errors), errors, dict(facts))
