"""Which rows a step computes, and which pages they have.

First come running rows, a token each; then rows that wait, until the step is full: those that are
continued before others, and of these first what is expected to take longest. Rows that are scored
are computed at once, about in the order in which they came; rows that are continued, and those
longer than a step, store keys and values in pages. A prefix that rows share goes before them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from dask_pcm.inference.engine.holdings import Holdings
from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool
from dask_pcm.inference.engine.parts import Part, at_once
from dask_pcm.inference.engine.rows import Embedded, Generated, Prefix, Row, RowError, Scored

#: A step is full once as many rows that wait have not fitted any more.
_MOST_MISSES = 64
#: Rows that are continued at the same time.
_MOST_RUNNING = 256


class Schedule:
    """The rows of an engine that have not ended.

    Parameters
    ----------
    pool
        Pages for keys and values.
    most_kept
        Outputs that a step may keep.

    Attributes
    ----------
    least_admitted
        Rows that are continued join others once there is room for as many.
    """

    def __init__(self, pool: PagePool, most_kept: int) -> None:
        self._held = Holdings(pool)
        self.prefixes = self._held.prefixes
        self._most_kept = most_kept
        self.least_admitted = 1
        self._is_admitting = True
        self._new: list[Row] = []
        self._waiting: list[Row] = []
        #: A row that is computed in several steps.
        self._long: Row | None = None
        #: The row for which all others had to let go of their pages.
        self._stuck: Row | None = None
        self._n_steps = 0

    @property
    def n_rows(self) -> int:
        """Rows that have not ended."""
        return len(self._new) + len(self._waiting) + len(self._held.running)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows."""
        self._new += rows

    def choose(self, budget_tokens: int) -> list[Part]:
        """What the next step computes, of as many tokens at most unless a row alone has more."""
        self._n_steps += 1
        self._admit()
        if self._is_turn_to_embed():
            parts: list[Part] = []
            self._fill(parts, Embedded, budget_tokens, budget_tokens)
            return parts
        n_free = _MOST_RUNNING - len(self._held.running)
        self._is_admitting = n_free >= self.least_admitted or not self._held.running
        parts = self._choose_running(budget_tokens)
        left = budget_tokens - sum(part.n_tokens for part in parts)
        # In turn: long prompts of one kind would fill every step before the other kind has any.
        kinds = (Generated, Scored) if self._n_steps % 2 else (Scored, Generated)
        for kind in kinds:
            left = self._fill(parts, kind, left, budget_tokens)
        if not parts and self.n_rows:
            self._make_progress()
        return parts

    def end(self, row: Row, result: Any) -> None:
        """A row has ended: it lets go of what it holds, and is told its result."""
        if isinstance(row, Generated) and row in self._held.running:
            self._held.running.remove(row)
        self._held.pool.release(row.pages)
        row.pages = []
        self.prefixes.leave(row)
        self._long = None if self._long is row else self._long
        row.done(result)

    def drop(self, rows: Collection[Row]) -> None:
        """Forget rows: they let go of what they hold."""
        gone = {id(row) for row in rows}
        self._new = [row for row in self._new if id(row) not in gone]
        self._waiting = [row for row in self._waiting if id(row) not in gone]
        self._held.running = [row for row in self._held.running if id(row) not in gone]
        for row in rows:
            self._held.let_go(row)
            self.prefixes.leave(row)
            self._long = None if self._long is row else self._long
            self._stuck = None if self._stuck is row else self._stuck

    def fail(self, row: Row, error: RowError) -> None:
        """A row cannot be computed; if it is a prefix, its rows do without it."""
        if isinstance(row, Prefix):
            for user in [*self._waiting, *self._new]:
                if user.prefix is not None and _is_within(user.prefix, row):
                    self.prefixes.leave(user)
            row.n_done = 0
            self._held.pool.release(row.pages)
            row.pages = []
            return
        self._waiting = [one for one in self._waiting if one is not row]
        self.end(row, error)

    def _admit(self) -> None:
        """Plan what new rows share, and put them where they belong among those that wait."""
        if self._new:
            self.prefixes.plan([row for row in self._new if not isinstance(row, Embedded)])
            # Rows of a length pack best; but batches that were begun first are the first to end.
            self._waiting += sorted(self._new, key=lambda row: -row.n_left)
            self._new = []
            self._waiting.sort(key=lambda row: -row.n_expected)

    def _choose_running(self, left: int) -> list[Part]:
        parts: list[Part] = []
        for row in list(self._held.running):
            # Others may have taken its pages meanwhile.
            is_running = row in self._held.running
            part = self._held.extend(row, min(row.n_left, left)) if is_running else None
            if part is not None:
                parts.append(part)
                left -= part.n_tokens
            if left <= 0:
                break
        self._requeue()
        return parts

    def _requeue(self) -> None:
        """Rows that had to let go of their pages wait again, before all others."""
        self._waiting[:0] = reversed(self._held.preempted)
        self._held.preempted.clear()

    def _is_turn_to_embed(self) -> bool:
        """Whether the step embeds, which is computed apart from the rest: every other one."""
        n_embedded = sum(isinstance(row, Embedded) for row in self._waiting)
        has_others = n_embedded < len(self._waiting) + len(self._held.running)
        return n_embedded > 0 and (not has_others or self._n_steps % 2 == 0)

    def _fill(self, parts: list[Part], kind: type[Row], left: int, budget_tokens: int) -> int:
        """Fill a step with waiting rows of a kind; returns for how many tokens it has room left."""
        is_embedding = kind is Embedded
        n_misses, n_kept = 0, sum(len(part.kept) for part in parts)
        taken: set[int] = set()
        chosen = {id(part.row) for part in parts}
        for row in self._waiting:
            if left <= 0 or n_misses >= _MOST_MISSES or n_kept >= self._most_kept:
                break
            if not isinstance(row, kind):
                continue
            part = self._part(row, left, budget_tokens, bool(parts))
            if part is None:
                n_misses += 1
                continue
            if part.row is row and isinstance(row, Generated):
                self._held.running.append(row)
            if part.row is row and (part.kept or isinstance(row, Generated)):
                taken.add(id(row))
            if id(part.row) not in chosen:  # several rows may wait for the same prefix
                chosen.add(id(part.row))
                parts.append(part)
                left -= part.n_tokens
                n_kept += 0 if is_embedding else len(part.kept)  # what is limited are logits
        self._waiting = [row for row in self._waiting if id(row) not in taken]
        return left

    def _part(self, row: Row, left: int, budget_tokens: int, is_begun: bool) -> Part | None:
        """What a step with room for `left` tokens computes of a waiting row; None for nothing."""
        prefix = row.prefix
        if prefix is not None and not row.n_done:
            prefix.used_at = self._n_steps
            if not prefix.is_ready:
                found = self._held.extend(_first_lacking(prefix), left)
                if found is not None or self._held.running or is_begun:
                    return found
                self.prefixes.leave(row)  # there is no room for it at all
                prefix = None
        if isinstance(row, Generated):
            is_admitted = self._is_admitting and len(self._held.running) < _MOST_RUNNING
            return self._held.extend(row, left) if is_admitted else None
        n_cached = row.n_done or (len(prefix.tokens) if prefix is not None else 0)
        n_tokens = row.n_left + row.n_done - n_cached
        if n_tokens <= left:
            return at_once(row)
        # All but its last token, whose logits are wanted, may be computed before.
        n_before = len(row.tokens) - n_cached - 1
        if n_tokens > budget_tokens and n_before and isinstance(row, Scored):
            # One row at a time: two might wait for each other's pages.
            self._long = self._long or row
            found = self._held.extend(row, min(n_before, left)) if self._long is row else None
            if self._long is not row or found is not None or self._held.running:
                return found
        return None if is_begun else at_once(row)

    def _make_progress(self) -> None:
        """No row has room: all let go of their pages. The first fails if it has none even then."""
        rows: list[Any] = self._held.running or self._waiting
        first = rows[0]
        if first is self._stuck or self._held.pool.n_free == self._held.pool.n_pages:
            rows.remove(first)
            n_tokens = self._held.pool.n_pages * PAGE_TOKENS
            text = f"The row needs room for more than {n_tokens} tokens, which the device has."
            self.end(first, RowError(text))
            return
        self._stuck = first
        for row in self._held.running[::-1]:
            self._held.preempt(row)
        self._requeue()
        for waiting in self._waiting:
            self._held.let_go(waiting)
            self.prefixes.leave(waiting)
        while self.prefixes.drop_one():
            pass


def _is_within(prefix: Prefix | None, outer: Prefix) -> bool:
    while prefix is not None and prefix is not outer:
        prefix = prefix.prefix
    return prefix is outer


def _first_lacking(prefix: Prefix) -> Prefix:
    """The outermost of the prefixes within which `prefix` lies that is not there yet."""
    while prefix.prefix is not None and not prefix.n_done and not prefix.prefix.is_ready:
        prefix = prefix.prefix
    return prefix
