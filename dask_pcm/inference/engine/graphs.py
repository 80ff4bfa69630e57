"""Steps in which each row has one token, as CUDA graphs: one launch in place of hundreds.

Such steps are short, and a GPU would wait for the host between their kernels. A graph has fixed
shapes: of a number of rows and of cached tokens, both rounded up to powers of two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dask_pcm.inference.engine import varlen
from dask_pcm.inference.engine.packs import Segment
from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool

logger = logging.getLogger(__name__)

_LEAST_ROWS, _LEAST_CACHED = 8, 4096
#: Each holds what its forward has computed; and takes three forwards to make.
_MOST_GRAPHS = 48


@dataclass(slots=True)
class _Pack:
    """What attention asks of a ``Pack``; see there."""

    ids: Any
    positions: Any
    stored: Any
    sequences: varlen.Sequences
    pool: PagePool
    is_causal: bool = True

    @property
    def n_plain(self) -> int:
        return int(self.ids.shape[1])


class Graphs:
    """Graphs of a model on a GPU; for one thread.

    Parameters
    ----------
    forward
        Computes logits, shape (tokens, vocabulary), of a pack.
    pool
        Pages for keys and values.
    """

    def __init__(self, forward: Callable[[Any], Any], pool: PagePool) -> None:
        self._forward = forward
        self._pool = pool
        self._made: dict[tuple[int, int], _Graph] = {}
        self.is_on = pool.kv.is_cuda and varlen.kernel() is not None

    def logits(self, segments: Sequence[Segment]) -> Any:
        """Logits of rows with one token each; None if there is no graph for them."""
        n_cached = sum(one.n_cached for one in segments)
        size = _rounded(len(segments), _LEAST_ROWS), _rounded(n_cached, _LEAST_CACHED)
        if not self.is_on or (size not in self._made and len(self._made) >= _MOST_GRAPHS):
            return None
        if size not in self._made:
            try:
                self._made[size] = _Graph(self._forward, self._pool, *size)
            except Exception as error:  # such as a model that asks the device for a number
                logger.info("No CUDA graphs for this model: %s", error)
                self.is_on = False
                return None
        return self._made[size].replay(segments)


class _Graph:
    """The forward of `n_rows` tokens that see `n_cached` others, captured once."""

    def __init__(
        self, forward: Callable[[Any], Any], pool: PagePool, n_rows: int, n_cached: int
    ) -> None:
        import torch

        self._n_rows = n_rows
        #: Ids, cached tokens and the index of the first page of each row; then their pages.
        self._n_pages = n_cached // PAGE_TOKENS + 2 * n_rows
        self._scratch = pool.scratch
        self._inputs = torch.zeros(3 * n_rows + self._n_pages, dtype=torch.int64)
        self._inputs = self._inputs.pin_memory() if pool.kv.is_cuda else self._inputs
        self._fill([])
        inputs = self._on_device = self._inputs.to(pool.kv.device)
        self._replay = _captured(lambda: forward(_pack_of(inputs, pool, n_rows, n_cached)))

    def replay(self, segments: Sequence[Segment]) -> Any:
        """Logits of rows, shape (rows, vocabulary); valid until the next call."""
        self._fill(segments)
        self._on_device.copy_(self._inputs, non_blocking=True)
        return self._replay()[: len(segments)]

    def _fill(self, segments: Sequence[Segment]) -> None:
        """Write the inputs; rows that are not there write to the scratch page."""
        import torch

        n_more = self._n_rows - len(segments)
        pages: list[int] = []
        first: list[int] = []
        for one in segments:
            first.append(len(pages))
            pages += one.cached
        pages += [self._scratch] * (self._n_pages - len(pages))
        self._inputs.copy_(
            torch.tensor(
                [
                    *(one.tokens[0] for one in segments),
                    *[0] * n_more,
                    *(one.n_cached for one in segments),
                    *[0] * n_more,
                    *first,
                    *[self._n_pages - 1] * n_more,
                    *pages,
                ]
            )
        )


def _captured(compute: Callable[[], Any]) -> Callable[[], Any]:
    """A graph of what a function computes on the device; calling it returns the same tensor."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is made at the first use is not captured
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may place another context on the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = compute()

    def replay() -> Any:
        graph.replay()
        return found

    return replay


def _pack_of(inputs: Any, pool: PagePool, n_rows: int, n_cached: int) -> _Pack:
    """A pack of fixed shapes, computed on the device from what `_Graph` has written there."""
    import torch

    ids, cached, first = inputs[: 3 * n_rows].view(3, n_rows)
    pages = inputs[3 * n_rows :]
    device = inputs.device
    row = torch.arange(n_rows, device=device)
    # Keys of all rows, one after another: cached ones and its own; some behind them fill up.
    n_keys = n_cached + n_rows
    ends = (cached + 1).cumsum(0)
    k = torch.arange(n_keys, device=device)
    line = torch.searchsorted(ends, k, right=True)
    of = line.clamp(max=n_rows - 1)
    at = k - (ends - cached - 1)[of]
    page = torch.where(line < n_rows, first[of] + at // PAGE_TOKENS, len(pages) - 1)
    sequences = varlen.Sequences(
        cu_queries=torch.arange(n_rows + 1, dtype=torch.int32, device=device),
        cu_keys=torch.nn.functional.pad(ends, (1, 0)).int(),
        most_queries=1,
        most_keys=n_cached + 1,
        n_keys=n_keys,
        cached=pool.index(pages[page], at % PAGE_TOKENS),
        own=(row, ends - 1),
    )
    stored = (row, pages[first + cached // PAGE_TOKENS], cached % PAGE_TOKENS)
    return _Pack(ids[None], cached[None], stored, sequences, pool)


def _rounded(n: int, least: int) -> int:
    """The next power of two, `least` at least.

    >>> _rounded(3, 8), _rounded(9, 8)
    (8, 16)
    """
    return max(least, 1 << (n - 1).bit_length())
