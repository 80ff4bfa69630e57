"""The prefixes that rows of an engine share, and those that stay for rows to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dask_pcm.inference.engine.pages import PagePool
from dask_pcm.inference.engine.prefixes import SharedPrefix, shared_prefixes
from dask_pcm.inference.engine.rows import Prefix, Row

#: Stands behind a known prefix, where rows have their own tokens.
_END = -1


class PrefixCache:
    """Keeps prefixes while rows use them, and after that while nothing else needs their pages.

    Parameters
    ----------
    pool
        Where they are.
    forget
        Is told a prefix that is given up.
    """

    def __init__(self, pool: PagePool, forget: Callable[[Prefix], None] = lambda _: None) -> None:
        self._pool = pool
        self._forget = forget
        self._known: list[Prefix] = []

    def plan(self, rows: Sequence[Row]) -> None:
        """Give rows the longest prefixes that they share with each other, or with known ones."""
        known = [[*one.tokens, _END] for one in self._known]
        tokens = [*known, *(row.tokens for row in rows)]
        todo: list[tuple[SharedPrefix, Prefix | None]] = [
            (one, None) for one in shared_prefixes(tokens)
        ]
        while todo:
            shared, outer = todo.pop()
            mine = [rows[k - len(known)] for k in shared.rows if k >= len(known)]
            if not mine:
                continue
            prefix = self._prefix(mine[0].tokens[: shared.n_tokens], outer)
            for row in mine:
                row.prefix = prefix  # of several, the longest comes last
            todo += [(one, prefix) for one in shared.inner]
        for row in rows:
            row.prefix = max((row.prefix, *self._begun_with(row)), key=_length)
            if row.prefix is not None:
                row.prefix.n_users += 1

    def leave(self, row: Row) -> None:
        """A row does without its prefix from now on."""
        prefix, row.prefix = row.prefix, None
        if prefix is not None:
            prefix.n_users -= 1

    def drop_one(self) -> bool:
        """Give up the prefix that has been without rows for longest; False if there is none."""
        idle = [one for one in self._known if not one.n_users]
        if not idle:
            return False
        oldest = min(idle, key=lambda one: one.used_at)
        self._known.remove(oldest)
        self.leave(oldest)
        self._pool.release(oldest.pages)
        oldest.pages = []
        self._forget(oldest)
        return True

    def on_device(self) -> list[Prefix]:
        """Prefixes that have pages, inner ones first."""
        return [one for one in self._known[::-1] if one.pages]

    def _begun_with(self, row: Row) -> Iterator[Prefix]:
        """Known prefixes with which a row begins; they cost nothing, however short they are."""
        for one in self._known:
            n = len(one.tokens)
            # The last token first: it is cheap to compare, and most rows differ there.
            if n < len(row.tokens) and one.tokens[-1] == row.tokens[n - 1]:
                yield from [one] if one.tokens == row.tokens[:n] else []

    def _prefix(self, tokens: list[int], outer: Prefix | None) -> Prefix:
        """A prefix that is known, or a new one that is computed from its outer one on."""
        for one in self._known:
            if one.tokens == tokens:
                return one
        made = Prefix(tokens, lambda _: None, outer)
        if outer is not None:
            outer.n_users += 1
        self._known.append(made)
        return made


def _length(prefix: Prefix | None) -> int:
    return 0 if prefix is None else len(prefix.tokens)
