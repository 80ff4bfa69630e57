"""Which rows a step computes.

A step is filled with rows of the client that was served least, and so on until it is full
(``timeslice.py``). Of a client's questions those go first that had the fewest slices. Of its rows
of batches, those that run go first, a token each, then those that wait: rows that are continued
before others, and of these first what is expected to take longest. Rows that are scored are
computed at once, about in the order in which they came; rows that are continued, and those longer
than a step, store keys and values in pages (``holdings.py``). A prefix that rows share goes before
them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from dask_pcm.inference.engine.holdings import Holdings
from dask_pcm.inference.engine.pages import PagePool
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.parts import Part, at_once
from dask_pcm.inference.engine.rows import Embedded, Generated, Prefix, Row, RowError, Scored
from dask_pcm.inference.engine.step import Candidates, Step
from dask_pcm.inference.engine.timeslice import Kind, Owner, TimeSlices


class Schedule:
    """The rows of an engine that have not ended.

    Parameters
    ----------
    pool
        Pages for keys and values.
    most_kept
        Outputs that a step may keep.
    paging
        Where rows go that make room for others.
    slices
        Whose turn it is.

    Attributes
    ----------
    n_refused
        Rows for which the last step had no memory: questions, and what has made room for others.
    least_admitted
        Rows of batches that are continued join others once there is room for as many.
    """

    def __init__(self, pool: PagePool, most_kept: int, paging: Paging, slices: TimeSlices) -> None:
        self._held = Holdings(pool, paging, slices)
        self._slices = slices
        self.prefixes = self._held.prefixes
        self._most_kept = most_kept
        self.least_admitted = 1
        self.n_refused = 0
        self._is_admitting = True
        self._new: list[Row] = []
        self._waiting: dict[Owner, list[Row]] = {}
        #: A row that is computed in several steps.
        self._long: Row | None = None
        #: The row for which all others have made room, and wait.
        self._stuck: Row | None = None
        #: Rows that have not ended, by identity.
        self._open: set[int] = set()
        self._n_steps = 0
        self._n_added = 0
        #: Whether a row has left the step to begin again without its prefix.
        self._has_restarted = False

    @property
    def n_rows(self) -> int:
        """Rows that have not ended."""
        n_waiting = sum(map(len, self._waiting.values()))
        return len(self._new) + n_waiting + self._held.n_running

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows."""
        for row in rows:
            self._slices.begin(row.owner)
            self._open.add(id(row))
            self._new.append(row)
            if isinstance(row, Generated):
                row.began_at, row.waits_since = self._n_added, self._n_steps
                self._n_added += 1

    def choose(self, budget_tokens: int) -> list[Part]:
        """What the next step computes, of as many tokens at most unless a row alone has more."""
        self._n_steps += 1
        self.n_refused = 0
        self._has_restarted = False
        self._held.kept, self._held.giving = self._stuck, self._long
        self._admit()
        self._held.begin_step(self._n_steps)
        n_free = self._held.n_free_places
        self._is_admitting = n_free >= self.least_admitted or not self._held.n_running
        step = Step(budget_tokens, budget_tokens)
        self._fill(step, self._kinds())
        self._requeue()
        if not step.parts and self.n_rows and not self._has_restarted:
            self._make_progress()
        return sorted(step.parts, key=lambda part: bool(part.segment.streamed))

    def end(self, row: Row, result: Any) -> None:
        """A row has ended: it lets go of what it holds, and is told its result."""
        self._forget(row)
        row.done(result)

    def drop(self, rows: Collection[Row]) -> None:
        """Forget rows: they let go of what they hold."""
        gone = {id(row) for row in rows}
        self._new = [row for row in self._new if id(row) not in gone]
        for owner, waiting in self._waiting.items():
            self._waiting[owner] = [row for row in waiting if id(row) not in gone]
        for row in rows:
            self._forget(row)

    def evacuate(self) -> None:
        """Have rows leave memory that lenders want back."""
        self._held.evacuate(self._all_waiting)
        self._requeue()

    def fail(self, row: Row, error: RowError) -> None:
        """A row cannot be computed; if it is a prefix, its rows do without it."""
        if isinstance(row, Prefix):
            for user in [*self._all_waiting(), *self._new]:
                if user.prefix is not None and any(one is row for one in user.prefix.outward()):
                    assert not user.is_parked  # else its prefix was computed
                    self.prefixes.leave(user)
            self._held.let_go(row)
            return
        waiting = self._waiting.get(row.owner, [])
        self._waiting[row.owner] = [one for one in waiting if one is not row]
        self.end(row, error)

    def _forget(self, row: Row) -> None:
        """A row that waits no more lets go of what it holds; of one that has ended, nothing is."""
        if id(row) in self._open:
            self._open.remove(id(row))
            self._slices.end(row.owner)
            self._held.remove(row)
            self.prefixes.leave(row)
            self._long = None if self._long is row else self._long
            self._stuck = None if self._stuck is row else self._stuck

    def _all_waiting(self) -> list[Row]:
        return [row for waiting in self._waiting.values() for row in waiting]

    def _admit(self) -> None:
        """Plan what new rows share, and put them where they belong among those that wait."""
        if not self._new:
            return
        self.prefixes.plan([row for row in self._new if not isinstance(row, Embedded)])
        # Rows of a length pack best; but batches that were begun first are the first to end.
        for row in sorted(self._new, key=lambda row: -row.n_left):
            self._waiting.setdefault(row.owner, []).append(row)
        for owner in {row.owner for row in self._new}:
            # What made room goes on first: the longer it waits, the later its batch is journalled.
            self._waiting[owner].sort(key=lambda row: (not row.is_parked, -row.n_expected))
        self._new = []

    def _kinds(self) -> tuple[type[Row], ...]:
        """The kinds of rows that the step computes, the first ones first.

        Vectors are computed apart from the rest, in every other step. Otherwise in turn: long
        prompts of one kind would fill every step before the other kind has any.
        """
        waiting = self._all_waiting()
        n_embedded = sum(isinstance(row, Embedded) for row in waiting)
        has_others = n_embedded < len(waiting) + self._held.n_running
        is_even = self._n_steps % 2 == 0
        if n_embedded and (not has_others or is_even):
            return (Embedded,)
        return (Scored, Generated) if is_even else (Generated, Scored)

    def _fill(self, step: Step, kinds: tuple[type[Row], ...]) -> None:
        """Fill a step, with rows of the client that was served least at any moment."""
        running: dict[Owner, list[Row]] = {}
        for one in self._held.running if Generated in kinds else ():
            running.setdefault(one.owner, []).append(one)
        # Not those whose last row has failed: they are not known any more.
        waiting = [owner for owner, rows in self._waiting.items() if rows]
        owners = [*running, *(owner for owner in waiting if owner not in running)]
        left = {who: self._candidates(who, running.get(who, []), kinds) for who in owners}
        taken: set[int] = set()
        if (stuck := self._stuck) is not None:
            alone = Candidates([[stuck]], self._held.is_running)
            self._serve(step, stuck.owner, alone, taken, is_alone=True)
            left = self._beside(stuck, left, running)
        while left and step.left > 0 and step.n_kept < self._most_kept:
            owner = self._slices.next_of(left)
            mine = left.pop(owner)
            if self._serve(step, owner, mine, taken, is_alone=not left):
                left[owner] = mine
        for owner in owners if taken else ():
            rows = self._waiting.get(owner, [])
            self._waiting[owner] = [row for row in rows if id(row) not in taken]
        # What is computed to its end is told a step later, and keeps no other one waiting.
        if self._long is not None and id(self._long) in taken:
            self._long = None
        if stuck is not None and id(stuck) in taken and not self._held.is_running(stuck):
            self._stuck = None
        self._waiting = {owner: rows for owner, rows in self._waiting.items() if rows}

    def _serve(
        self, step: Step, owner: Owner, mine: Candidates, taken: set[int], is_alone: bool
    ) -> bool:
        """See `_choose_some`; what is computed is charged."""
        has_more = self._choose_some(step, mine, taken, is_alone)
        self._slices.charge(owner, mine.n_prompt, mine.n_output)
        mine.n_prompt = mine.n_output = 0
        return has_more

    def _beside(
        self, stuck: Row, left: dict[Owner, Candidates], running: dict[Owner, list[Row]]
    ) -> dict[Owner, Candidates]:
        """Who is served beside a row for which all others have made room.

        Questions, if that row may run for long; and only those that run while it has no room.
        """
        if not self._held.is_long(stuck):
            return {}
        others = [one for one in left if one.kind is Kind.QUESTION and one != stuck.owner]
        if self._held.is_chosen(stuck):
            return {one: left[one] for one in others}
        ours = self._held.is_running
        return {one: Candidates([running.get(one, [])], ours) for one in others}

    def _candidates(
        self, owner: Owner, running: list[Row], kinds: tuple[type[Row], ...]
    ) -> Candidates:
        waiting = self._waiting.get(owner, [])
        lists = [[row for row in waiting if isinstance(row, kind)] for kind in kinds]
        if owner.kind is Kind.BATCH or Generated not in kinds:
            return Candidates([running, *lists], self._held.is_running)
        mine = [row for row in (*running, *waiting) if isinstance(row, Generated)]
        mine.sort(key=lambda row: self._slices.turn(row, self._n_steps))
        lists[kinds.index(Generated)] = list[Row](mine)
        return Candidates(lists, self._held.is_running)

    def _choose_some(self, step: Step, mine: Candidates, taken: set[int], is_alone: bool) -> bool:
        """Choose what the step computes of a client's next row, or of all if it is alone.

        False if there is no other row.
        """
        held = self._held
        while (row := mine.next()) is not None:
            is_running = held.is_running(row)
            if not is_running and row in held.preempted:  # a moment ago
                continue
            part = self._part(row, step, is_running)
            if part is None:
                mine.n_misses += not is_running
                self.n_refused += not is_running and _is_urgent(row)
            else:
                if not is_running and part.row is row and (part.kept or isinstance(row, Generated)):
                    taken.add(id(row))
                if not held.is_chosen(part.row):  # several rows may wait for the same prefix
                    held.choose(part.row)
                    self._add(step, mine, part)
            if not is_alone or step.left <= 0 or step.n_kept >= self._most_kept:
                return True
        return False

    def _add(self, step: Step, mine: Candidates, part: Part) -> None:
        """Compute a part, and count it; what is computed again was counted before."""
        row, n_tokens = part.row, part.n_tokens
        step.add(part, n_tokens)
        if not isinstance(row, Generated):
            mine.n_prompt += n_tokens
            return
        n_prompt = min(row.n_done + n_tokens, row.n_prompt)
        n_new = max(0, n_prompt - max(row.n_charged, row.n_done))
        if not n_new and not part.kept:  # or rows that are computed again would never get further
            return
        row.n_charged = max(row.n_charged, n_prompt)
        mine.n_prompt += n_new
        mine.n_output += len(part.kept)
        row.n_turns += 1
        row.waits_since = self._slices.served_at(row, self._n_steps)

    def _requeue(self) -> None:
        """Rows that had to let go of their pages wait again, before all others."""
        for row in self._held.preempted:
            self._waiting.setdefault(row.owner, []).insert(0, row)
        self._held.preempted.clear()

    def _part(self, row: Row, step: Step, is_running: bool) -> Part | None:
        """What a step computes of a row; None for nothing."""
        if row.prefix is not None and self._held.is_long(row):
            self._held.do_without_prefix(row)
            if is_running:  # it begins again in the next step
                self._has_restarted = True
                return None
        is_new = isinstance(row, Generated) and not row.n_charged
        if is_new and not row.n_done and not self._held.find_memory(row):
            if self._held.is_hopeless(row):
                self.fail(row, RowError(self._held.too_small_for(row)))
                self._held.paging.return_unused()
            return None
        if is_running:
            n_left = row.n_left
            return self._held.extend(row, n_left if n_left == 1 else self._share(step, row))
        prefix = row.prefix
        if prefix is not None and not row.pages:
            for one in prefix.outward():
                one.used_at = self._n_steps
            if not prefix.is_ready or not self._held.restore(prefix, row):
                lacking = None if prefix.is_ready else prefix.first_lacking()
                found = None if lacking is None else self._held.extend(lacking, step.left, row)
                if found is not None or row.n_done or self._held.n_running or step.parts:
                    return found
                self.prefixes.leave(row)  # there is no room for it at all
                prefix = None
        if isinstance(row, Generated):
            is_admitted = row.owner.kind is Kind.QUESTION or self._is_admitting
            return self._held.admit(row, self._share(step, row)) if is_admitted else None
        n_cached = row.n_done or (len(prefix.tokens) if prefix is not None else 0)
        n_tokens = row.n_left + row.n_done - n_cached
        if n_tokens <= step.left:
            return at_once(row)
        # All but its last token, whose logits are wanted, may be computed before.
        n_before = len(row.tokens) - n_cached - 1
        if n_tokens > step.budget_tokens and n_before and isinstance(row, Scored):
            # One row at a time: two might wait for each other's pages.
            self._long = self._long or row
            is_mine = self._long is row
            found = self._held.extend(row, min(n_before, step.left)) if is_mine else None
            if not is_mine or found is not None or self._held.n_running:
                return found
        return None if step.parts else at_once(row)

    def _share(self, step: Step, row: Row) -> int:
        """Tokens that a row may have of a step: the others that run have one each."""
        n_others = self._held.n_unchosen - self._held.is_running(row)
        return max(1, min(row.n_left, step.left - n_others))

    def _make_progress(self) -> None:
        """No row has room: all make room, and the first is computed alone, until it ends.

        Without its prefix if there is no room for both; it fails if there is none even then.
        """
        row = self._stuck
        if row is not None and row.prefix is None:
            if not self._held.is_long(row) or not self._held.let_go_parked(row, self._all_waiting):
                self.fail(row, RowError(self._held.too_small_for(row)))
            return
        if row is not None:
            self._held.do_without_prefix(row)
        for one in self._held.running[::-1]:
            self._held.preempt(one)
        self._requeue()
        waiting = sorted(self._all_waiting(), key=lambda row: self._slices.place(row.owner))
        self._stuck, self._long = row or waiting[0], None
        for waits in waiting:
            if waits.pages:
                self._held.let_go(waits)
        for prefix in self.prefixes.on_device():
            self._held.park_prefix(prefix, waiting)


def _is_urgent(row: Row) -> bool:
    """Whether a row is a question, or has begun; the others of batches may wait."""
    return isinstance(row, Generated) and (row.owner.kind is Kind.QUESTION or row.n_charged > 0)
