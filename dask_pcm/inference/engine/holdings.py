"""The pages that rows of an engine hold, and which of them make room for others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from dask_pcm.inference.engine.packs import Segment
from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool, PoolFullError, n_pages_for
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.parts import Part
from dask_pcm.inference.engine.prefix_cache import PrefixCache
from dask_pcm.inference.engine.rows import Generated, Prefix, Row
from dask_pcm.inference.engine.timeslice import Kind, Owner, TimeSlices

#: Rows that are continued at the same time.
_MOST_RUNNING = 256
#: How long lenders are asked for what a new row lacks, in seconds.
_PATIENCE_S = 5.0


class Holdings:
    """Gives pages to rows. If they run out, prefixes without rows go first, then the last rows.

    The last ones are those of the client that was served most; of a client's questions, those that
    had most slices, and of its rows of batches those that began last.

    Parameters
    ----------
    pool
        Pages for keys and values.
    paging
        Where rows go that make room.
    slices
        Whose turn it is.

    Attributes
    ----------
    preempted
        Rows that had to let go of their pages, the last ones first.
    kept
        A row that makes room for no other.
    giving
        A row that does not run, and whose first pages leave the device if questions need room.
    """

    def __init__(self, pool: PagePool, paging: Paging, slices: TimeSlices) -> None:
        self.pool = pool
        self.paging = paging
        self.slices = slices
        self.prefixes = PrefixCache(pool, paging.forget)
        self.preempted: list[Generated] = []
        self.kept: Row | None = None
        self.giving: Row | None = None
        #: By identity, in the order in which they got their pages; and how many each client has.
        self._running: dict[int, Generated] = {}
        self._n_running: Counter[Owner] = Counter()
        self._now = 0
        #: What a row may have at the same time of which not all can be there.
        self._most_pages = max(1, pool.n_pages // 2)
        #: Rows that the step computes, which keep their pages; and running rows that it does not.
        self._chosen: set[int] = set()
        self.n_unchosen = 0
        #: Clients, and whether their rows have begun, for which no others make room in this step.
        self._refused: set[tuple[Owner, bool]] = set()

    @property
    def running(self) -> list[Generated]:
        """Rows that are continued and have pages, in the order in which they got them."""
        return list(self._running.values())

    @property
    def n_running(self) -> int:
        """How many rows run."""
        return len(self._running)

    @property
    def n_free_places(self) -> int:
        """How many more rows may run."""
        return _MOST_RUNNING - len(self._running)

    def is_running(self, row: Row) -> bool:
        """Whether a row runs."""
        return id(row) in self._running

    def begin_step(self, now: int) -> None:
        """Nothing is chosen for step `now` yet."""
        self._now = now
        self._chosen.clear()
        self._refused.clear()
        self.n_unchosen = len(self._running)

    def choose(self, row: Row) -> None:
        """The step computes some of a row."""
        self._chosen.add(id(row))
        self.n_unchosen -= id(row) in self._running

    def is_chosen(self, row: Row) -> bool:
        """Whether the step computes some of a row."""
        return id(row) in self._chosen

    def admit(self, row: Generated, n_tokens: int) -> Part | None:
        """Have a row run, from its next tokens on; None if there is no room for it."""
        if self.n_free_places <= 0:
            victims = self._victims(row)
            if not victims:
                return None
            self.preempt(victims[0])
        part = self.extend(row, n_tokens)
        if part is not None:
            self._running[id(row)] = row
            self._n_running[row.owner] += 1
            self.n_unchosen += 1
        return part

    def extend(self, row: Row, n_tokens: int, asking: Row | None = None) -> Part | None:
        """Some of a row's next tokens, which are stored; None if there is no room for them.

        Others make room for `asking`: of a prefix, the row that needs it.
        """
        asking = asking or row
        if self.is_long(row):
            n_tokens = min(n_tokens, self._most_pages * PAGE_TOKENS - row.n_done % PAGE_TOKENS)
        if row.pages:
            n_tokens = self._go_on(row, min(n_tokens, len(row.tokens) - row.n_done), asking)
            if not n_tokens:
                return None
        elif not self._begin(row, n_tokens, asking):
            return None
        first, streamed = row.n_done, row.copies[: row.n_out]
        stop = min(first + n_tokens, len(row.tokens))
        n_cached = first - row.n_out * PAGE_TOKENS
        segment = Segment(
            row.tokens[first:stop],
            range(first, stop),
            list(row.pages),
            n_cached,
            True,
            streamed=streamed,
        )
        is_last = stop == len(row.tokens) and isinstance(row, Generated)
        return Part(row, segment, [stop - first - 1] if is_last else [])

    def is_long(self, row: Row) -> bool:
        """Whether all pages are too few for a row, whose first ones leave the device then."""
        n_pages = n_pages_for(len(row.tokens))
        return n_pages > self.pool.n_pages and not isinstance(row, Prefix)

    def too_small_for(self, row: Row) -> str:
        """What to say of a row for which there is no room at all."""
        slabs = self.paging.slabs
        here, off, lent = (
            f"{n_pages * PAGE_TOKENS:,}"
            for n_pages in (self.pool.n_pages, slabs.most_pages, slabs.n_borrowed)
        )
        return (
            f"The row needs room for more than {len(row.tokens):,} tokens. There is room for {here}"
            f" on the device, for {off} in the host's memory, which pcm.inference.host-pages sets,"
            f" and for {lent} in memory that is lent."
        )

    def find_memory(self, row: Row) -> bool:
        """Whether there is memory for what a row has, on the device and off it; may borrow some."""
        n_off = n_pages_for(len(row.tokens)) - self.pool.n_pages
        n_lacking = self.paging.slabs.borrow_for(n_off)
        if n_lacking and (not row.n_lacking or n_lacking < row.n_lacking):
            row.lacks_since = time.monotonic()
        row.n_lacking = n_lacking
        return not n_lacking

    def is_hopeless(self, row: Row) -> bool:
        """Whether the memory that a row lacks will not come: lenders are asked for some seconds."""
        is_late = time.monotonic() >= row.lacks_since + _PATIENCE_S
        return bool(row.n_lacking) and (is_late or not self.paging.slabs.may_borrow)

    def _go_on(self, row: Row, n_tokens: int, asking: Row) -> int:
        """Give a row that has pages those for its next tokens; of how many, 0 for none."""
        n_all = n_pages_for(row.n_done + n_tokens)
        if self.is_long(row):
            self._shrink(row, n_all - row.n_out - self._most_pages)
        n_pages = n_all - row.n_out - len(row.pages)
        if n_pages <= 0:
            return n_tokens
        try:
            row.pages += self._take(n_pages, asking)
            return n_tokens
        except PoolFullError:
            if not self.is_long(row):
                return 0
        # It goes on within its own pages, and those that are free.
        if not self._shrink(row, n_pages - self.pool.n_free):
            self._shrink(row, 1)
        room = (row.n_out + len(row.pages) + self.pool.n_free) * PAGE_TOKENS - row.n_done
        n_tokens = min(n_tokens, room)
        n_pages = n_pages_for(row.n_done + n_tokens) - row.n_out - len(row.pages)
        row.pages += self.pool.take(max(0, n_pages))
        return n_tokens

    def _shrink(self, row: Row, n_pages: int) -> bool:
        """Have full pages of a row, its first ones, leave the device; False if they cannot."""
        n_pages = min(n_pages, row.n_done // PAGE_TOKENS - row.n_out)
        return n_pages <= 0 or self.paging.out_first(row, n_pages)

    def _begin(self, row: Row, n_tokens: int, asking: Row) -> bool:
        """Give pages to a row that has none, for what it has stored and its next tokens."""
        prefix = row.prefix
        if prefix is not None and not self.restore(prefix, asking):
            return False
        n_begun = row.n_done or (len(prefix.tokens) if prefix is not None else 0)
        n_shared = n_begun // PAGE_TOKENS if prefix is not None and not row.n_done else row.n_shared
        stop = min(n_begun + n_tokens, len(row.tokens))
        n_out = 0
        if row.is_parked and self.is_long(row):
            n_full = row.n_done // PAGE_TOKENS
            room = min(self._most_pages, self.pool.n_free)
            n_out = max(0, n_full - max(0, room - (n_pages_for(stop) - n_full)))
        try:
            pages = self._take(n_pages_for(stop) - n_shared - n_out, asking)
        except PoolFullError:
            return False
        row.n_out = n_out
        if row.is_parked:
            self._bring_back(row, pages)
        elif prefix is not None:
            self._begin_with(row, prefix, pages)
        else:
            row.pages = pages
        return True

    def restore(self, prefix: Prefix, row: Row) -> bool:
        """Bring a prefix back to the device if it is parked; False if there is no room for it."""
        if prefix.is_parked:
            try:
                pages = self._take(n_pages_for(prefix.n_done), row)
            except PoolFullError:
                return False
            self._bring_back(prefix, pages)
        return True

    def remove(self, row: Row) -> None:
        """A row leaves: it lets go of all that it has."""
        if self._running.pop(id(row), None) is not None:
            self._n_running[row.owner] -= 1
        self.pool.release(row.pages)
        self.paging.forget(row)
        row.pages = []

    def let_go(self, row: Row) -> None:
        """Take all that a row has stored: it is computed from its tokens again if it goes on."""
        self.paging.n_recomputed += row.n_done
        self.pool.release(row.pages)
        self.paging.forget(row)
        row.pages, row.n_done, row.n_shared, row.n_out = [], 0, 0, 0

    def do_without_prefix(self, row: Row) -> None:
        """Have a row do without its prefix: there is no room for both."""
        if isinstance(row, Generated) and self.is_running(row):
            self.preempt(row)
        self.let_go(row)
        self.prefixes.leave(row)

    def preempt(self, row: Generated) -> None:
        """Take the pages of a row that runs; see `preempted`."""
        self._stop(row)
        if not self.paging.out(row):
            self.let_go(row)

    def _stop(self, row: Generated) -> None:
        del self._running[id(row)]
        self._n_running[row.owner] -= 1
        self.n_unchosen -= not self.is_chosen(row)
        self.preempted.append(row)

    def park_prefix(self, prefix: Prefix, users: Iterable[Row]) -> None:
        """Take the pages of a prefix; if it is computed again, so are its rows, which wait."""
        if not (prefix.is_ready and self.paging.out(prefix, is_wanted=True)):
            self._let_go_prefix(prefix, users)

    def _let_go_prefix(self, prefix: Prefix, users: Iterable[Row]) -> None:
        for row in users:
            if row.prefix is prefix and row.is_parked:
                self.let_go(row)
        self.let_go(prefix)

    def let_go_parked(self, row: Row, waiting: Callable[[], Iterable[Row]]) -> bool:
        """Let go of what other rows have off the device; False if there is nothing."""
        parked = [one for one in self.paging.parked if one is not row]
        for one in parked:
            if isinstance(one, Prefix):
                self._let_go_prefix(one, waiting())
            else:
                self.let_go(one)
        return bool(parked)

    def evacuate(self, waiting: Callable[[], Iterable[Row]]) -> None:
        """Have rows leave memory that lenders want back; those that wait are asked for if needed.

        For what there is no other room is computed again.
        """

        def let_go(row: Row) -> None:
            if isinstance(row, Prefix):
                self._let_go_prefix(row, waiting())
            else:
                if isinstance(row, Generated) and self.is_running(row):
                    self._stop(row)
                self.let_go(row)

        self.paging.evacuate(let_go)

    def _begin_with(self, row: Row, prefix: Prefix, pages: list[int]) -> None:
        """Give a row the pages of its prefix; the last one is copied, since the row writes it."""
        n_full, n_rest = divmod(len(prefix.tokens), PAGE_TOKENS)
        if n_rest:
            self.pool.copy(prefix.pages[n_full], pages[0])
        self.pool.share(prefix.pages[:n_full])
        row.pages, row.n_done = [*prefix.pages[:n_full], *pages], len(prefix.tokens)
        # A prefix lets go of the one around it once it is there: then all pages are its own.
        row.n_shared = 0 if isinstance(row, Prefix) else n_full

    def _bring_back(self, row: Row, pages: list[int]) -> None:
        """Bring back what a row has off the device, to the first ones of `pages`."""
        n_own = n_pages_for(row.n_done) - row.n_shared - row.n_out
        shared = row.prefix.pages[: row.n_shared] if row.prefix is not None else []
        self.pool.share(shared)
        self.paging.back(row, shared, pages[:n_own])
        row.pages += pages[n_own:]

    def _take(self, n_pages: int, row: Row) -> list[int]:
        """Take pages for a row.

        Raises
        ------
        PoolFullError
            There are not enough, even of rows that come after it.
        """
        while self.pool.n_free < n_pages and self.prefixes.drop_one():
            pass
        lacking = n_pages - self.pool.n_free
        giving = self.giving
        if lacking > 0 and giving is not None and giving is not row and not self.is_chosen(giving):
            if self.is_long(giving) and row.owner.kind is Kind.QUESTION:
                self._shrink(giving, min(lacking, len(giving.pages) - 1))
            lacking = n_pages - self.pool.n_free
        if lacking > 0:
            enough: list[Generated | Prefix] = []
            found: list[Generated | Prefix] = [*self._victims(row), *self._idle_prefixes(row)]
            for one in found:
                enough.append(one)
                lacking -= self.pool.n_exclusive(one.pages)
                if lacking <= 0:
                    break
            # All or nothing: what does not help keeps its pages. Prefixes first, as there may be no
            # room for them off the device.
            enough.sort(key=lambda one: not isinstance(one, Prefix))
            for one in enough if lacking <= 0 else ():
                if isinstance(one, Generated):
                    self.preempt(one)
                elif not self.paging.out(one, is_wanted=True):
                    break
        return self.pool.take(n_pages)

    def _idle_prefixes(self, row: Row) -> list[Prefix]:
        """Prefixes whose rows wait, and may wait longer than a question."""
        if row.owner.kind is Kind.BATCH or not isinstance(row, Generated):
            return []
        return [
            one
            for one in self.prefixes.on_device()
            if one.is_ready and one.used_at < self._now and self.pool.n_exclusive(one.pages)
        ]

    def _victims(self, row: Row) -> list[Generated]:
        """Rows whose pages `row` may have, the last one first."""
        others: Iterable[Generated] = (
            one
            for one in self._running.values()
            if one is not row and one is not self.kept and not self.is_chosen(one)
        )
        if not isinstance(row, Generated):
            return []
        if self.is_running(row):
            places = {key: k for k, key in enumerate(self._running)}
            mine = (*self._urgency(row), places[id(row)])
            later = (one for one in others if (*self._urgency(one), places[id(one)]) > mine)
            return sorted(later, key=lambda one: (self._urgency(one), places[id(one)]))[::-1]
        is_alone = row.owner.kind is Kind.BATCH and self._n_running[row.owner] == self.n_running
        claim = row.owner, bool(row.n_turns)  # new questions may displace more
        if is_alone or claim in self._refused:
            return []
        may = [one for one in others if self.slices.may_displace(row, one, self._now)]
        if not may:
            self._refused.add(claim)
        return sorted(may, key=self._urgency)[::-1]

    def _urgency(self, row: Generated) -> tuple[Any, ...]:
        return *self.slices.place(row.owner), self.slices.n_slices(row)

    def validate(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        self.pool.validate()
        self.paging.validate()
        self.slices.validate()
        assert all(not row.is_parked for row in self.running)
        assert +self._n_running == Counter(row.owner for row in self.running)
