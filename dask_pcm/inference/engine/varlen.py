"""Attention over packs by a kernel for sequences of different lengths, where a GPU has one.

The kernel is torch's ``varlen_attn`` (FlashAttention; Dao, "FlashAttention-2", ICLR 2024): nothing
is padded, no mask is written. What rows have in pages is gathered in front of their own keys. An
ending of a trie is a sequence of its own, of which only the last tokens ask.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_pcm.inference.engine.pages import PAGE_TOKENS

if TYPE_CHECKING:
    from dask_pcm.inference.engine.packs import Segment

#: The kernel knows heads of as many numbers at most.
_MOST_HEAD_DIM = 256


@dataclass(slots=True)
class Sequences:
    """The tokens of a pack as sequences: some last tokens of each ask all of it.

    Attributes
    ----------
    cu_queries, cu_keys
        Where the tokens that ask, and the keys, of each sequence begin; shape (sequences + 1,).
    most_queries, most_keys
        Of the longest sequences.
    n_keys
        Keys of all.
    order
        Places in the pack of the tokens that ask; None if they are in order.
    own
        Places in the pack that keys are from, and where in the sequences they go; None if keys are
        the pack's, in order.
    cached
        Pages, slots and places in the sequences of other keys; None if there are none.
    """

    cu_queries: Any
    cu_keys: Any
    most_queries: int
    most_keys: int
    n_keys: int
    order: Any = None
    own: Any = None
    cached: Any = None

    def keys(self, pages: Any, own: Any, width: slice) -> Any:
        """Keys, or values, of all sequences, shape (keys, heads, dim).

        Parameters
        ----------
        pages
            Of one layer, shape (pages, slots, heads, key + value); None if there are none.
        own
            Of the pack, shape (tokens, heads, dim).
        width
            Which of a page's numbers they are.
        """
        if self.own is None:
            return own
        found = own.new_empty(self.n_keys, *own.shape[1:])
        source, to = self.own
        found[to] = own[source]
        if self.cached is not None:
            page, slot, to = self.cached
            found[to] = pages[page, slot][..., width]
        return found


def sequences_of(segments: Sequence[Segment], starts: Sequence[int], device: Any) -> Sequences:
    """Sequences of a pack; `starts` are where its segments begin."""
    import torch

    lines = [
        (line, ask, chain)
        for line, (segment, start) in enumerate(zip(segments, starts, strict=True))
        for ask, chain in _chains(segment, start)
    ]
    cached = [segments[line].n_cached for line, _, _ in lines]
    n_queries = [ask for _, ask, _ in lines]
    n_keys = [n + len(chain) for n, (_, _, chain) in zip(cached, lines, strict=True)]

    def put(values: Sequence[Any], dtype: Any = torch.int64) -> Any:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    def spread(lengths: Sequence[int]) -> tuple[Any, Any]:
        """The sequence of each of its tokens, and the token's place in it."""
        n, total = put(lengths), sum(lengths)
        line = torch.repeat_interleave(n, output_size=total)
        return line, torch.arange(total, device=device) - (n.cumsum(0) - n)[line]

    cu_queries, cu_keys = (
        put([0, *itertools.accumulate(one)], torch.int32) for one in (n_queries, n_keys)
    )
    found = Sequences(cu_queries, cu_keys, max(n_queries), max(n_keys), sum(n_keys))
    is_branched = len(lines) > len(segments)
    if is_branched:
        found.order = put([k for _, ask, chain in lines for k in chain[len(chain) - ask :]])
    begins = cu_keys[:-1].long()
    if any(cached):
        line, at = spread(cached)
        table = put(_padded([segments[k].cached for k, _, _ in lines]))
        found.cached = (table[line, at // PAGE_TOKENS], at % PAGE_TOKENS, begins[line] + at)
        begins = begins + put(cached)
    if any(cached) or is_branched:
        line, at = spread([len(chain) for _, _, chain in lines])
        found.own = (put([k for _, _, chain in lines for k in chain]), begins[line] + at)
    return found


def _chains(segment: Segment, start: int) -> list[tuple[int, Sequence[int]]]:
    """Sequences of a segment: how many last tokens ask, and places in the pack of all."""
    n, parents = len(segment.tokens), segment.parents
    if parents is None:
        return [(n, range(start, start + n))]
    found: list[tuple[int, Sequence[int]]] = []
    inner, has_asked = set(parents), [False] * n
    for leaf in range(n):
        if leaf in inner:
            continue
        chain, at = [], leaf
        while at >= 0:
            chain.append(at)
            at = parents[at]
        chain.reverse()
        n_asked = sum(has_asked[k] for k in chain)  # by an earlier ending that begins alike
        for k in chain[n_asked:]:
            has_asked[k] = True
        found.append((len(chain) - n_asked, [start + k for k in chain]))
    return found


def _padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    n = max(len(row) for row in rows)
    return [[*row, *[0] * (n - len(row))] for row in rows]


def is_taken(query: Any, value: Any) -> bool:
    """Whether there is a kernel for such queries and values, shapes (tokens, heads, dim)."""
    import torch

    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= _MOST_HEAD_DIM
        and kernel() is not None
    )


@functools.cache
def kernel() -> Callable[..., Any] | None:
    """The kernel, with heads in groups allowed; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    named = inspect.signature(varlen_attn).parameters
    if "window_size" not in named:
        return None
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in named else varlen_attn


def attend(
    of: Sequences,
    pages: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    window: int | None,
    is_causal: bool,
) -> Any:
    """Attention of one layer; shapes (tokens, heads, dim), as they are in the pack."""
    import torch

    compute = kernel()
    assert compute is not None
    dim = k.shape[-1]
    keys = of.keys(pages, k, slice(0, dim))
    values = of.keys(pages, v, slice(dim, None))
    queries = q.contiguous() if of.order is None else q[of.order]
    left = -1 if window is None else window - 1
    found = compute(
        queries,
        keys.contiguous(),
        values.contiguous(),
        of.cu_queries,
        of.cu_keys,
        of.most_queries,
        of.most_keys,
        scale=scale,
        window_size=(left, 0) if is_causal else (left, left),
    )
    if of.order is None:
        return found
    out = torch.empty_like(found)
    out[of.order] = found
    return out
