"""Attention of rows whose keys and values take more than the device has for them.

The first pages of such a row stay off the device. The attention of a layer reads that layer of them
piece by piece. What it finds in a piece is merged with the rest by log-sum-exp, as FlashAttention
merges blocks (Dao et al., NeurIPS 2022), so the result is that of all keys at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_pcm.inference.engine.pages import PAGE_TOKENS, moved

if TYPE_CHECKING:
    from dask_pcm.inference.engine.packs import Group
    from dask_pcm.inference.engine.slabs import Place

#: Pages that are read at once, of one layer; and scores that are computed at once.
_PIECE_PAGES, _MOST_SCORES = 64, 1 << 22


@dataclass(slots=True)
class Streamed:
    """Tokens of a row in a pack, and where the row's first pages are.

    Attributes
    ----------
    span
        The tokens' places in the pack.
    group
        How they see the row's other keys, which are on the device.
    places
        Pages off the device, of the row's first tokens.
    positions
        Of the tokens in their row, shape (tokens,), on the device; and the first of them.
    """

    span: slice
    group: Group
    places: Sequence[Place]
    positions: Any
    first_position: int

    def pieces(self, layer: int, window: int | None) -> Iterator[tuple[Any, Any]]:
        """Keys and values of a layer, shape (tokens, heads, key + value), and which are seen.

        The latter has the shape (tokens that ask, tokens), or is None for all. What is outside of a
        sliding window is not read.
        """
        import torch

        begin = 0
        if window is not None:
            begin = max(0, self.first_position - window + 1) // PAGE_TOKENS
        for at in range(begin, len(self.places), _PIECE_PAGES):
            found = _read(self.places[at : at + _PIECE_PAGES], layer, self.positions.device)
            first = at * PAGE_TOKENS
            keys = torch.arange(first, first + len(found), device=found.device)
            yield found, None if window is None else self._sees(keys, window)

    def sees(self, some: slice, window: int | None) -> Any:
        """Which of some keys on the device each token sees, shape (tokens, keys)."""
        if self.group.is_stored:  # no mask of all is written: it may be large
            return self._sees(self.group.key_positions[0, some], window)
        return self.group.mask(window)[0, 0, :, some]

    def _sees(self, keys: Any, window: int | None) -> Any:
        distance = self.positions[:, None] - keys
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class Merged:
    """Attention to keys that come in pieces, in float32.

    Parameters
    ----------
    queries
        Shape (heads, tokens, dim).
    n_heads, value_dim
        Of keys and values, and numbers of a value.
    scale
        Factor of the scores.
    softcap
        Their cap, if the model has one.
    """

    def __init__(
        self, queries: Any, n_heads: int, value_dim: int, scale: float, softcap: float | None
    ) -> None:
        # Heads that share keys are in a dimension of their own.
        self._queries = queries.float().unflatten(0, (n_heads, -1))
        self._softcap = softcap
        self._scale = scale
        sizes = self._queries.shape[:-1]
        self._sum = self._queries.new_zeros(*sizes, value_dim)
        self._log_weight = self._queries.new_full(sizes, float("-inf"))

    def add(self, keys: Any, values: Any, seen: Any = None) -> None:
        """Attend to more keys, too.

        Parameters
        ----------
        keys, values
            Shape (key heads, keys, dim).
        seen
            Which of them each token sees, shape (tokens, keys); None for all.
        """
        n_heads, n_shared, n_tokens, _ = self._queries.shape
        n_keys = keys.shape[1]
        step = max(1, _MOST_SCORES // max(1, n_heads * n_shared * n_keys))
        keys, values = keys.float()[:, None].transpose(-1, -2), values.float()[:, None]
        for begin in range(0, n_tokens, step):
            some = slice(begin, begin + step)
            scores = (self._queries[:, :, some] @ keys) * self._scale
            if self._softcap is not None:
                scores = self._softcap * (scores / self._softcap).tanh()
            if seen is not None:
                scores = scores.masked_fill(~seen[some], float("-inf"))
            log_weight = scores.logsumexp(-1)
            self._merge(some, _weighted(scores, log_weight, values), log_weight)

    def add_sink(self, sink: Any) -> None:
        """Attend to a key without a value, too, whose score is that of each head."""
        score = sink.float().view(*self._queries.shape[:2], 1).expand_as(self._log_weight)
        self._merge(slice(None), 0.0, score)

    def _merge(self, some: slice, found: Any, log_weight: Any) -> None:
        """Merge what tokens have found in some keys, and the logarithm of how much that weighs."""
        import torch

        before = self._log_weight[:, :, some]
        both = torch.logaddexp(before, log_weight)
        # Where nothing was seen so far, there is nothing to scale.
        base = both.masked_fill(both == float("-inf"), 0.0)
        old, new = ((one - base).exp()[..., None] for one in (before, log_weight))
        self._sum[:, :, some] = self._sum[:, :, some] * old + found * new
        self._log_weight[:, :, some] = both

    def result(self) -> Any:
        """Shape (tokens, heads, value dim)."""
        return self._sum.flatten(0, 1).transpose(0, 1)


def attend(
    one: Streamed,
    layer: int,
    queries: Any,
    keys: Any,
    values: Any,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Any,
) -> Any:
    """Attention of a layer for a row's tokens, shape (tokens, heads, value dim).

    Parameters
    ----------
    queries, keys, values
        Of the tokens, and of the row's keys on the device; shapes (heads, tokens or keys, dim).
    """
    n_heads, n_keys, key_dim = keys.shape
    total = Merged(queries, n_heads, values.shape[-1], scale, softcap)
    size, seen_from = _PIECE_PAGES * PAGE_TOKENS, 0
    if window is not None:
        seen_from = one.first_position - window + 1 - len(one.places) * PAGE_TOKENS
    for begin in range(min(max(0, seen_from), n_keys - 1), n_keys, size):
        some = slice(begin, begin + size)
        total.add(keys[:, some], values[:, some], one.sees(some, window))
    for piece, seen in one.pieces(layer, window):
        piece = piece.transpose(0, 1)
        total.add(piece[..., :key_dim], piece[..., key_dim:], seen)
    if sink is not None:
        total.add_sink(sink)
    return total.result().to(queries.dtype)


def _weighted(scores: Any, log_weight: Any, values: Any) -> Any:
    """Mean of the values by the scores' exponentials; zero where no key is seen."""
    base = log_weight.masked_fill(log_weight == float("-inf"), 0.0)
    return (scores - base[..., None]).exp() @ values


def _read(places: Sequence[Place], layer: int, device: Any) -> Any:
    """Keys and values of a layer in pages off the device; shape (tokens, heads, key + value)."""
    import torch

    found = []
    for _, run in itertools.groupby(places, key=lambda place: id(place[0])):
        pages = list(run)
        memory = pages[0][0].memory
        index = torch.tensor([at for _, at in pages], device=memory.device)
        mine = memory[:, layer].index_select(0, index)
        found.append(mine.to(device, non_blocking=True) if mine.is_cuda else moved(mine, device))
    return torch.cat(found).flatten(0, 1)
