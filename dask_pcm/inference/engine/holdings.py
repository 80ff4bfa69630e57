"""The pages that rows of an engine hold, and which of them make room for others."""

from __future__ import annotations

from dask_pcm.inference.engine.packs import Segment
from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool, PoolFullError, n_pages_for
from dask_pcm.inference.engine.parts import Part
from dask_pcm.inference.engine.prefix_cache import PrefixCache
from dask_pcm.inference.engine.rows import Generated, Prefix, Row


class Holdings:
    """Gives pages to rows. If pages run out, prefixes without rows go first, then the newest rows.

    Parameters
    ----------
    pool
        Pages for keys and values.

    Attributes
    ----------
    running
        Rows that are continued, in the order in which they began.
    preempted
        Rows that ran and had to let go of their pages, the newest first. They are computed again
        later, from their tokens.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.prefixes = PrefixCache(pool)
        self.running: list[Generated] = []
        self.preempted: list[Generated] = []

    def extend(self, row: Row, n_tokens: int) -> Part | None:
        """Some of a row's next tokens, which are stored; None if there is no room for them."""
        try:
            if row.prefix is not None and not row.n_done:
                self._begin_with(row, row.prefix)
            n_tokens = min(n_tokens, len(row.tokens) - row.n_done)
            lacking = n_pages_for(row.n_done + n_tokens) - len(row.pages)
            row.pages += self._take(lacking, row) if lacking > 0 else []
        except PoolFullError:
            return None
        first, stop = row.n_done, row.n_done + n_tokens
        segment = Segment(row.tokens[first:stop], range(first, stop), list(row.pages), first, True)
        is_last = isinstance(row, Generated) and stop == len(row.tokens)
        return Part(row, segment, [n_tokens - 1] if is_last else [])

    def let_go(self, row: Row) -> None:
        """Take the pages of a row, which is computed from its tokens again if it goes on."""
        self.pool.release(row.pages)
        row.pages, row.n_done = [], 0

    def preempt(self, row: Generated) -> None:
        """Take the pages of a row that runs; see `preempted`."""
        self.running.remove(row)
        self.preempted.append(row)
        self.let_go(row)

    def _begin_with(self, row: Row, prefix: Prefix) -> None:
        """Give a row the pages of its prefix; the last one is copied, since the row writes it."""
        n_full, n_rest = divmod(len(prefix.tokens), PAGE_TOKENS)
        last = self._take(1, row) if n_rest else []
        if last:
            self.pool.copy(prefix.pages[n_full], last[0])
        self.pool.share(prefix.pages[:n_full])
        row.pages, row.n_done = [*prefix.pages[:n_full], *last], len(prefix.tokens)

    def _take(self, n_pages: int, row: Row) -> list[int]:
        """Take pages: of prefixes without rows, then of rows that began later than `row`.

        Raises
        ------
        PoolFullError
            There are not enough.
        """
        while self.pool.n_free < n_pages:
            if self.prefixes.drop_one():
                continue
            last = self.running[-1] if self.running else None
            if last is None or last is row or row not in self.running:
                raise PoolFullError
            self.preempt(last)
        return self.pool.take(n_pages)
