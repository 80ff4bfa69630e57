"""The engine: each step computes the tokens of many rows in one forward.

For one thread. ``schedule.py`` says what a step computes. A device computes a step while the host
prepares the next one: scores are taken a step later, tokens at once, since they go on from there.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.forward import Forward
from dask_pcm.inference.engine.graphs import Graphs
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import PagePool, on_device, on_host
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.parts import Part
from dask_pcm.inference.engine.rows import (
    NOT_A_NUMBER,
    Embedded,
    Generated,
    Prefix,
    Row,
    RowError,
    Scored,
)
from dask_pcm.inference.engine.sampling import Sampling, choose
from dask_pcm.inference.engine.schedule import Schedule
from dask_pcm.inference.engine.timeslice import TimeSlices
from dask_pcm.ladder.objects.tensors import is_sticky

logger = logging.getLogger(__name__)

#: Logits that a step keeps at most.
_MOST_LOGITS = 1 << 26
#: Where steps of single tokens are graphs, rows that are continued join in as many as this.
_LEAST_ADMITTED = 32
#: Steps with as large a share of the tokens that they may have are full.
_FULL = 0.9


class Engine:
    """Computes rows with a model whose attention was switched (``attention.switch``).

    Parameters
    ----------
    model
        A model of transformers.
    pool
        Pages for keys and values.
    capacity
        Tokens of a step at most.
    n_vocabulary
        Logits of a token.
    is_causal
        False for encoders, whose tokens see all of their row; they only embed.
    first_position
        The position of a row's first token, as the model counts them.
    paging
        Where rows go that make room for others; by default, memory of the host (see ``Paging``).
    slices
        Whose turn it is.

    Attributes
    ----------
    n_steps, n_tokens, n_failed
        Forwards so far, the tokens that they computed, and forwards that failed.
    """

    def __init__(
        self,
        model: Any,
        pool: PagePool,
        capacity: Capacity,
        n_vocabulary: int,
        *,
        is_causal: bool = True,
        first_position: int = 0,
        paging: Paging | None = None,
        slices: TimeSlices | None = None,
    ) -> None:
        self._forward = Forward(model, is_causal)
        self._is_causal = is_causal
        self._first_position = first_position
        self._pool = pool
        self.capacity = capacity
        self._graphs = Graphs(self._forward.logits, pool)
        self.paging = paging or Paging(pool)
        most_kept = max(1, _MOST_LOGITS // n_vocabulary)
        self.schedule = Schedule(pool, most_kept, self.paging, slices or TimeSlices())
        if self._graphs.is_on:  # a step of single tokens costs less than one with others
            self.schedule.least_admitted = _LEAST_ADMITTED
        self.n_steps = 0
        self.n_tokens = 0
        self.n_failed = 0
        self._has_warned = False
        #: What is to be done once the device has computed a step, and for how many rows.
        self._open: list[tuple[Callable[[], None], int]] = []

    @property
    def n_rows(self) -> int:
        """Rows that have not ended."""
        return self.schedule.n_rows + sum(n for _, n in self._open)

    @property
    def n_waiting(self) -> int:
        """Rows that the last step had no memory for; read on any thread."""
        return self.schedule.n_refused

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; each is told its result by ``Row.done`` within a ``step``."""
        self.schedule.add(rows)

    def close(self) -> None:
        """Let go of rows that have not ended, and of what refers to this engine."""
        self._open = []
        self.paging.close()

    def drop(self, rows: Collection[Row]) -> None:
        """Forget rows that have not ended; they are told nothing more, or what is known already."""
        self.schedule.drop(rows)

    def evacuate(self) -> None:
        """Leave memory that lenders want back."""
        self.schedule.evacuate()

    def step(self) -> None:
        """Begin one forward, and tell results of the one before; does nothing without rows."""
        begun, tokens = time.perf_counter(), self.capacity.tokens
        before, self._open = self._open, []
        parts = self.schedule.choose(tokens)
        if parts:
            self._try(parts)
        for tell, _ in before:
            tell()
        n_tokens = sum(part.n_tokens for part in parts)
        # What is read from off the device says nothing about the size of steps.
        if n_tokens >= _FULL * tokens and not any(part.segment.streamed for part in parts):
            seconds = time.perf_counter() - begun
            self.capacity.observe(n_tokens, seconds)
            self.paging.observe(n_tokens, seconds)

    def _try(self, parts: Sequence[Part]) -> bool:
        """Compute a forward; if it fails, its halves, down to the rows that are the cause.

        Returns
        -------
        bool
            Whether all of its rows were computed.
        """
        try:
            self._run(parts)
            return True
        except Exception as error:
            self.n_failed += 1
            if is_sticky(error):  # every later forward would fail, and the rows are not the cause
                raise
            said = f"{type(error).__name__}: {error}"
            is_explained = is_out_of_memory(error)
            if is_explained:
                n_tokens = sum(part.n_tokens for part in parts)
                self.capacity.fail(n_tokens)
            if len(parts) == 1:
                self.schedule.fail(parts[0].row, RowError(said))
                return False
        half = len(parts) // 2
        is_whole = [self._try(part) for part in (parts[:half], parts[half:])]
        if all(is_whole) and not is_explained and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "A step of %d rows failed, and each of them can be computed in smaller steps, which"
                " take longer: %s. Please report it, with the model and the versions of torch and"
                " transformers.",
                len(parts),
                said,
            )
        return all(is_whole)

    def _run(self, parts: Sequence[Part]) -> None:
        """Compute a forward, and take what it says of each row."""
        import torch

        segments = [part.segment for part in parts]
        begins = [0, *itertools.accumulate(len(part.kept) for part in parts)]
        found = list(zip(parts, begins, strict=False))
        with torch.inference_mode():
            self._pool.clean()
            outputs = self._graphs.logits(segments) if _is_single(parts) else None
            if outputs is None:
                pack = self._packed(segments)
                kept = [
                    start + k
                    for part, start in zip(parts, pack.starts, strict=True)
                    for k in part.kept
                ]
                is_embedding = isinstance(parts[0].row, Embedded)
                compute = self._forward.hidden if is_embedding else self._forward.logits
                outputs = compute(pack, on_device(kept, pack.ids.device))
        self.n_steps += 1
        self.n_tokens += sum(len(one.tokens) for one in segments)
        for part in parts:
            if part.segment.is_stored:
                part.row.n_done += part.n_tokens
                if isinstance(part.row, Prefix) and part.row.is_ready:
                    self.schedule.prefixes.leave(part.row)  # it has what it needs of its outer one
        wanted = [(part.row, slice(at, at + len(part.kept))) for part, at in found if part.kept]
        with torch.inference_mode():
            if scored := [(row, at) for row, at in wanted if isinstance(row, Scored)]:
                self._take_scores(scored, outputs)
            if generated := [(row, at) for row, at in wanted if isinstance(row, Generated)]:
                self._take_tokens(generated, outputs)
            if embedded := [(row, at) for row, at in wanted if isinstance(row, Embedded)]:
                self._take_vectors(embedded, outputs)

    def _packed(self, segments: Sequence[Segment]) -> Pack:
        device, first = self._pool.kv.device, self._first_position
        if self._is_causal:
            return Pack(segments, self._pool, device, first_position=first)
        return Pack(segments, None, device, is_causal=False, first_position=first)

    def _take_scores(self, found: Sequence[tuple[Scored, slice]], logits: Any) -> None:
        """Sum the log-probabilities of each ending's tokens."""
        import torch

        wanted = [
            (at.start + 1 + index, token)
            for row, at in found
            for ending in row.trie.wanted
            for index, token in ending
        ]
        line, token = on_device(wanted, logits.device).unbind(1)
        wait = on_host(logits[line, token] - torch.logsumexp(logits, -1)[line])

        def tell() -> None:
            values = iter(wait().tolist())
            for row, _ in found:
                scores = [sum(next(values) for _ in ending) for ending in row.trie.wanted]
                self._end(row, scores, not any(map(math.isnan, scores)))

        self._open.append((tell, len(found)))

    def _take_tokens(self, found: Sequence[tuple[Generated, slice]], logits: Any) -> None:
        """Choose the next token of each row."""
        groups: dict[Sampling, list[tuple[Generated, int]]] = {}
        for row, at in found:
            groups.setdefault(row.sampling, []).append((row, at.start))
        for sampling, members in groups.items():
            numbers = [row.number for row, _ in members]
            places = [len(row.tokens) for row, _ in members]
            mine = logits[on_device([at for _, at in members], logits.device)]
            chosen = choose(mine, sampling, numbers, places)
            # What is not a number is chosen before all that is one.
            is_number = ~mine.gather(1, chosen[:, None])[:, 0].isnan()
            tokens = on_host(chosen.where(is_number, -1))().tolist()
            for (row, _), token in zip(members, tokens, strict=True):
                if token < 0 or row.append(token):
                    self._end(row, row.new, token >= 0)

    def _take_vectors(self, found: Sequence[tuple[Embedded, slice]], hidden: Any) -> None:
        """Pool the hidden states of each row."""
        import torch

        lengths = on_device([at.stop - at.start for _, at in found], hidden.device)
        wait = on_host(torch.segment_reduce(hidden, "mean", lengths=lengths))

        def tell() -> None:
            for (row, _), vector in zip(found, wait().numpy(), strict=True):
                self._end(row, vector, not np.isnan(vector).any())

        self._open.append((tell, len(found)))

    def _end(self, row: Row, result: Any, is_number: bool) -> None:
        """A row has its result, unless the model did not compute numbers."""
        if not is_number:
            result = RowError(NOT_A_NUMBER)
        self.schedule.end(row, result)


def _is_single(parts: Sequence[Part]) -> bool:
    """Whether a step computes one token of each row, and wants its logits."""
    return all(
        part.n_tokens == 1 and part.kept and part.segment.is_stored and not part.segment.streamed
        for part in parts
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward has found no memory, on a device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
