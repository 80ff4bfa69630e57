"""What a step computes of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dask_pcm.inference.engine.packs import Segment
from dask_pcm.inference.engine.pages import PAGE_TOKENS
from dask_pcm.inference.engine.rows import Embedded, Row, Scored


@dataclass(slots=True)
class Part:
    """What a step computes of a row.

    Attributes
    ----------
    kept
        Tokens of the segment whose outputs are wanted.
    """

    row: Row
    segment: Segment
    kept: Sequence[int]

    @property
    def n_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.segment.tokens)


def at_once(row: Row) -> Part:
    """All that is left of a row, without storing keys and values."""
    cached, n_done = row.pages, row.n_done
    if row.prefix is not None and not n_done:
        cached, n_done = row.prefix.pages, len(row.prefix.tokens)
    own = row.tokens[n_done:]
    n_own, n_tokens = len(own), len(row.tokens)
    positions: list[int] = list(range(n_done, n_tokens))
    if isinstance(row, Embedded):
        return Part(row, Segment(own, positions), row.pooling.kept(n_own))
    assert isinstance(row, Scored)
    trie, parents = row.trie, None
    if trie.tokens:
        parents = [*range(-1, n_own - 1), *(n_own + parent for parent in trie.parents)]
        own = [*own, *trie.tokens]
        positions += [n_tokens + depth for depth in trie.depths]
    kept = range(n_own - 1, len(own))
    n_cached, streamed = n_done - row.n_out * PAGE_TOKENS, row.copies[: row.n_out]
    return Part(row, Segment(own, positions, cached, n_cached, False, parents, streamed), kept)
