"""Rows in one line of tokens, and how attention finds its way in them.

Everything but attention looks at tokens one by one, so a forward computes the tokens of many rows
one after another. Attention is computed for rows of similar lengths together, padded to the longest
of them; keys and values of earlier tokens come from pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dask_pcm.inference.engine.long_context import Streamed
from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool, moved, on_device
from dask_pcm.inference.engine.slabs import Place
from dask_pcm.inference.engine.varlen import Sequences, sequences_of

#: Rows share a group if they are at least this share of its longest; or if all are as short. On a
#: GPU each group takes time to launch, and what is padded takes little.
_ALIKE, _SHORT_TOKENS = 0.75, 16
_ALIKE_ON_GPU, _SHORT_TOKENS_ON_GPU = 0.25, 128
#: On CPUs, longer rows without cached tokens are groups of their own: nothing is padded or copied.
_LONG_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Segment:
    """Some tokens of one row in a pack.

    Attributes
    ----------
    tokens
        Ids.
    positions
        Where each is in its row; tokens of alternative endings share positions.
    cached, n_cached
        Pages of the tokens before, and how many tokens they hold.
    is_stored
        Whether keys and values are written to `cached`, which then has room for them.
    parents
        For each token, the index of the token before it, -1 for those in pages; None where it is
        always the previous one. Endings that begin alike share tokens, as in a trie.
    streamed
        Where the row's first pages, before `cached`, are off the device (``long_context.py``).
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    cached: Sequence[int] = ()
    n_cached: int = 0
    is_stored: bool = False
    parents: Sequence[int] | None = None
    streamed: Sequence[Place] = ()


@dataclass(slots=True)
class Group:
    """Rows whose attention is computed together.

    Attributes
    ----------
    index
        Places of the tokens in the pack, shape (rows, tokens); shorter rows repeat their last.
    kept
        Shape (2, tokens of all rows): places in the pack, and in the flat `index`.
    positions, key_positions
        Of tokens and of keys in their rows, shapes (rows, tokens) and (rows, keys).
    sees
        Which keys each token sees, shape (rows, 1, tokens, keys); None for all up to itself, or
        for all.
    table
        Pages of each row, or of all rows, shape (rows or 1, pages); None for none.
    is_stored
        Whether the rows' own keys are in these pages as well.
    n_positions
        Positions of the longest row.
    is_causal
        Whether tokens see only those before them.
    span
        Where the only row of the group is in the pack; None for several, or with cached tokens.
    """

    index: Any
    kept: Any
    positions: Any
    key_positions: Any
    sees: Any
    table: Any
    is_stored: bool
    n_positions: int
    is_causal: bool = True
    span: slice | None = None
    _masks: dict[int, Any] = field(default_factory=dict)

    def mask(self, window: int | None) -> Any:
        """Which keys each token sees, within a sliding window if there is one."""
        # A window that no row reaches changes nothing, and would cost the causal kernel.
        if window is None or self.n_positions <= window:
            return self.sees
        if window not in self._masks:
            near = self.positions[:, :, None] - self.key_positions[:, None, :]
            near = (near if self.is_causal else near.abs()) < window
            # By place, not by position: what pads a row repeats its last token.
            own = near.tril() if self.is_causal else near
            seen = own if self.sees is None else self.sees[:, 0] & near
            self._masks[window] = seen[:, None]
        return self._masks[window]


class Pack:
    """The tokens of one forward.

    Parameters
    ----------
    segments
        Of rows; each has a token at least. Those of which pages are streamed come last.
    pool
        Where cached tokens are; None if there are none.
    device
        Where the model is.
    is_causal
        False for encoders, whose tokens see all of their row.
    first_position
        The position of a row's first token, as the model counts them.

    Attributes
    ----------
    ids, positions
        What the model is given, shape (1, tokens).
    starts
        Where each segment begins.
    n_plain
        Tokens, the first ones, of rows of which nothing is streamed.
    stored
        Of tokens that are stored: their places in the pack, their pages and slots; or None.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        pool: PagePool | None = None,
        device: Any = "cpu",
        is_causal: bool = True,
        first_position: int = 0,
    ) -> None:
        import torch

        self.pool = pool
        self.is_causal = is_causal
        self._segments = segments
        self._device = device
        self.ids = on_device([[t for s in segments for t in s.tokens]], device)
        positions = [p for s in segments for p in s.positions]
        self._positions = torch.tensor(positions)
        self.positions = on_device([[first_position + p for p in positions]], device)
        self.starts: list[int] = []
        at = 0
        for segment in segments:
            self.starts.append(at)
            at += len(segment.tokens)
        self._plain = [one for one in segments if not one.streamed]
        self.n_plain = sum(len(one.tokens) for one in self._plain)
        assert not any(one.streamed for one in segments[: len(self._plain)])
        self.stored = self._plan_stores(segments)

    @cached_property
    def groups(self) -> list[Group]:
        """Rows whose attention is computed together, padded to the longest of them."""
        is_cpu = self.ids.device.type == "cpu"
        found = _alike(self._plain, is_cpu)
        return [self._group(self._segments, one, self._positions) for one in found]

    @cached_property
    def sequences(self) -> Sequences:
        """The rows as they are, for a kernel that takes sequences of different lengths."""
        starts = self.starts[: len(self._plain)]
        return sequences_of(self._plain, starts, self.pool, self._device)

    @cached_property
    def streamed(self) -> list[Streamed]:
        """Tokens of rows of which some pages are off the device."""
        found = []
        for k in range(len(self._plain), len(self._segments)):
            one = self._segments[k]
            span = slice(self.starts[k], self.starts[k] + len(one.tokens))
            positions = self._positions[span]
            group = self._group(self._segments, [k], self._positions)
            where = moved(positions, self._device)
            found.append(Streamed(span, group, one.streamed, where, int(positions[0])))
        return found

    def _plan_stores(self, segments: Sequence[Segment]) -> Any:
        found = [
            (start + k, one.cached[at // PAGE_TOKENS], at % PAGE_TOKENS)
            for one, start in zip(segments, self.starts, strict=True)
            if one.is_stored
            for k, at in enumerate(range(one.n_cached, one.n_cached + len(one.tokens)))
        ]
        return on_device(found, self._device).unbind(1) if found else None

    def _group(self, segments: Sequence[Segment], members: Sequence[int], positions: Any) -> Group:
        import torch

        rows = [segments[k] for k in members]
        starts = torch.tensor([self.starts[k] for k in members])[:, None]
        lengths = torch.tensor([len(row.tokens) for row in rows])[:, None]
        offsets = torch.arange(int(lengths.max()))[None]
        index = starts + torch.minimum(offsets, lengths - 1)
        is_own = offsets < lengths
        kept = torch.stack([index[is_own], is_own.flatten().nonzero()[:, 0]])
        own_at = key_at = positions[index]
        sees, table = self._sees(rows, is_own), None
        if rows[0].cached:
            assert self.pool is not None
            table = _table_of(rows, self.pool.scratch)
            sees, cached_at = _with_cached(rows, sees, table.shape[1], offsets.shape[1])
            key_at = cached_at if rows[0].is_stored else torch.cat([cached_at, own_at], 1)
        tensors: list[Any] = [index, kept, own_at, key_at, sees, table]
        a, b, c, d, e, f = (None if one is None else moved(one, self._device) for one in tensors)
        n_positions, span = int(own_at.max()) + 1, None
        if len(rows) == 1 and table is None:
            span = slice(self.starts[members[0]], self.starts[members[0]] + int(lengths))
        return Group(a, b, c, d, e, f, rows[0].is_stored, n_positions, self.is_causal, span)

    def _sees(self, rows: Sequence[Segment], is_own: Any) -> Any:
        """Which of a row's own tokens each of them sees; None if all, or all before it."""
        import torch

        n_tokens = is_own.shape[1]
        if not self.is_causal:
            return None if is_own.all() else is_own[:, None, None].expand(-1, 1, n_tokens, -1)
        if all(row.parents is None for row in rows):
            return None
        sees = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
        for line, row in enumerate(rows):
            parents = row.parents or ()
            branch = next((k for k, parent in enumerate(parents) if parent != k - 1), len(parents))
            for k in range(branch, len(parents)):
                sees[line, k] = sees[line, parents[k]] if parents[k] >= 0 else False
                sees[line, k, k] = True
        return sees[:, None]


def _table_of(rows: Sequence[Segment], scratch: int) -> Any:
    """Pages of rows; a single line if all only read the same ones."""
    import torch

    if not rows[0].is_stored:
        return torch.tensor([rows[0].cached])
    n_pages = max(len(row.cached) for row in rows)
    return torch.tensor([[*row.cached, *[scratch] * (n_pages - len(row.cached))] for row in rows])


def _with_cached(
    rows: Sequence[Segment], sees: Any, n_pages: int, n_tokens: int
) -> tuple[Any, Any]:
    """Which keys tokens see where some are in pages, and the positions of those in pages."""
    import torch

    cached = torch.arange(n_pages * PAGE_TOKENS)
    n_cached = torch.tensor([row.n_cached for row in rows])[:, None, None]
    n_before = torch.tensor([len(row.streamed) * PAGE_TOKENS for row in rows])
    at = n_before[:, None] + cached
    if rows[0].streamed and rows[0].is_stored:  # by position, piece by piece
        return None, at
    if rows[0].is_stored:
        return (cached <= n_cached + torch.arange(n_tokens)[:, None])[:, None], at
    if sees is None:
        sees = torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool).tril()
    before = (cached < n_cached)[:, None].expand(-1, -1, n_tokens, -1)
    return torch.cat([before, sees.expand(len(rows), -1, -1, -1)], -1), at


def _alike(segments: Sequence[Segment], is_cpu: bool) -> Iterator[list[int]]:
    """Positions of segments that share a group."""

    alike = _ALIKE if is_cpu else _ALIKE_ON_GPU
    short = _SHORT_TOKENS if is_cpu else _SHORT_TOKENS_ON_GPU

    def kind(k: int) -> tuple[Any, ...]:
        one = segments[k]
        # Rows that only read a prefix share it; those that write have pages of their own.
        return (one.is_stored, () if one.is_stored else tuple(one.cached))

    group: list[int] = []
    order = sorted(range(len(segments)), key=lambda k: (*kind(k), len(segments[k].tokens)))
    for k in reversed(order):
        if group:
            n_tokens, longest = len(segments[k].tokens), len(segments[group[0]].tokens)
            is_alike = n_tokens >= alike * longest or 1 < n_tokens <= longest <= short
            is_apart = is_cpu and longest > _LONG_TOKENS and not segments[k].cached
            if kind(group[0]) != kind(k) or is_apart or not is_alike:
                yield group
                group = []
        group.append(k)
    if group:
        yield group
