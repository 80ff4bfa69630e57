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

from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool, on_device

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
    cached
        Index of each key in the pool, for the first layer (``PagePool.index``); for those that are
        the pack's, of anything. None if all are.
    own
        Places in the pack of the keys that are the pack's, and where they go in the sequences; None
        if all are, in order.
    """

    cu_queries: Any
    cu_keys: Any
    most_queries: int
    most_keys: int
    n_keys: int
    order: Any = None
    own: Any = None
    cached: Any = None

    def keys_and_values(self, pool: PagePool | None, layer: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Those of all sequences, from those of the pack; shapes (keys, heads, dim)."""
        import torch

        if self.own is None:
            return k, v
        source, to = self.own
        own = torch.cat([k, v], -1)[source]
        if self.cached is None:
            found = own
        else:
            assert pool is not None
            found = pool.gather(self.cached, layer)
            found[to] = own
        return found[..., : k.shape[-1]], found[..., k.shape[-1] :]


def sequences_of(
    segments: Sequence[Segment], starts: Sequence[int], pool: PagePool | None, device: Any
) -> Sequences:
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
        return on_device(values, device, dtype)

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
        assert pool is not None
        line, at = spread(n_keys)
        table = put(_padded([segments[k].cached for k, _, _ in lines]))
        is_cached = at < put(cached)[line]
        at = torch.where(is_cached, at, 0)  # the others are the pack's own
        found.cached = pool.index(table[line, at // PAGE_TOKENS], at % PAGE_TOKENS)
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
    n = max(1, *(len(row) for row in rows))
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
    pool: PagePool | None,
    layer: int,
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
    keys, values = of.keys_and_values(pool, layer, k, v)
    queries = q if of.order is None else q[of.order]
    left = -1 if window is None else window - 1
    found = compute(
        queries,
        keys,
        values,
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
