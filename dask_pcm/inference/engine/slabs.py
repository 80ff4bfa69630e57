"""Memory off the device for pages, in slabs: of the host, or lent by a neighbour.

Slabs are on rungs, the fastest first: devices of neighbours, this host's memory, and what
neighbours lend of theirs. What is lent is used until its lender wants it back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

logger = logging.getLogger(__name__)

#: Pages of a slab: few calls for memory, and little that is not used.
_SLAB_PAGES = 64
#: Pages that are borrowed where a slab is too much.
_LEAST_PAGES = 16
#: Slabs that are borrowed between two steps for a row that has no room.
_SLABS_AT_ONCE = 4


class Lent(Protocol):
    """Memory that is lent, until its lender wants it back.

    Attributes
    ----------
    is_own
        Whether it is of the engine's own device, which has it to spare.
    """

    is_own: bool
    is_wanted_back: bool

    def memory(self) -> Any:
        """Its bytes as a tensor, uint8."""

    def on_wanted(self, call: Callable[[], None]) -> None:
        """Have something called, on any thread, once the memory is wanted back."""

    def close(self) -> None:
        """Return the memory, which is not used any more."""


#: Borrows memory of a "device" or of the "host", in bytes; None if nothing is to be had.
Borrow: TypeAlias = Callable[[str, int], Lent | None]


class Slab:
    """Room for some pages in one piece of memory.

    Parameters
    ----------
    memory
        A tensor, shape (pages, numbers of a page ...).
    loan
        Whose memory it is; None if it is the engine's.

    Attributes
    ----------
    free
        Places that no page has.
    """

    def __init__(self, memory: Any, loan: Lent | None = None) -> None:
        self.memory = memory
        self.loan = loan
        self.n_pages = len(memory)
        self.free = list(range(self.n_pages))[::-1]

    @property
    def n_used(self) -> int:
        """Places that a page has."""
        return self.n_pages - len(self.free)

    @property
    def is_wanted_back(self) -> bool:
        """Whether a lender wants its memory back."""
        return self.loan is not None and self.loan.is_wanted_back

    def close(self) -> None:
        """Let go of the memory."""
        self.memory = None
        if self.loan is not None:
            self.loan.close()


#: Where a page is off the device: a slab, and the page's index in it.
Place: TypeAlias = tuple[Slab, int]


class Slabs:
    """Places for pages off the device; for one thread.

    Parameters
    ----------
    make
        Takes memory of the host for a number of pages.
    most_pages
        Pages for which it may take such memory.

    Attributes
    ----------
    most_pages
        As given, or less once the host had no memory left.
    n_lent
        Pages that were sent to memory that is lent.
    may_borrow
        Whether there may be memory to borrow.
    """

    def __init__(self, make: Callable[[int], Any], most_pages: int) -> None:
        self._make = make
        self.most_pages = most_pages
        self._n_made = 0
        self._near: list[Slab] = []
        self._own: list[Slab] = []
        self._far: list[Slab] = []
        self._borrow: Callable[[str, int], Slab | None] = lambda rung, n_pages: None
        self.n_lent = 0
        self.may_borrow = False

    def lend(self, borrow: Callable[[str, int], Slab | None]) -> None:
        """Where to borrow slabs: of a rung, for as many pages."""
        self._borrow, self.may_borrow = borrow, True

    @property
    def n_borrowed(self) -> int:
        """Pages for which there is memory that is lent now, and not wanted back."""
        lent = (*self._near, *self._far)
        return sum(slab.n_pages for slab in lent if not slab.is_wanted_back)

    @property
    def _all(self) -> Iterator[Slab]:
        yield from (*self._near, *self._own, *self._far)

    @property
    def n_used(self) -> int:
        """Pages that are there."""
        return sum(slab.n_used for slab in self._all)

    @property
    def n_elsewhere(self) -> int:
        """Pages that are there and not on the engine's own device."""
        return sum(s.n_used for s in self._all if s.loan is None or not s.loan.is_own)

    @property
    def n_free(self) -> int:
        """Pages for which there is room, or memory of the host that may be taken."""
        free = sum(len(slab.free) for slab in self._all if not slab.is_wanted_back)
        return free + self.most_pages - self._n_made

    def take(self, n_pages: int) -> list[Place] | None:
        """Places for pages; None if there is no room for all of them."""
        found: list[Place] = []
        rungs: list[tuple[list[Slab], Callable[[], Slab | None]]] = [
            (self._near, lambda: self._borrowed("device")),
            (self._own, self._made),
            (self._far, lambda: self._borrowed("host")),
        ]
        for slabs, add in rungs:
            _take_from(slabs, n_pages, found)
            while len(found) < n_pages and (slab := add()) is not None:
                slabs.append(slab)
                _take_from([slab], n_pages, found)
        if len(found) < n_pages:
            self.release(found)
            return None
        self.n_lent += sum(slab.loan is not None for slab, _ in found)
        return found

    def borrow_for(self, n_pages: int) -> int:
        """Borrow for a row of `n_pages`, a few slabs a call; return for how many there are none.

        As if no other row had any.
        """
        for _ in range(_SLABS_AT_ONCE):
            if self.most_pages + self.n_borrowed >= n_pages:
                break
            for slabs, rung in ((self._near, "device"), (self._far, "host")):
                if (slab := self._borrowed(rung)) is not None:
                    slabs.append(slab)
                    break
            else:
                break
        return max(0, n_pages - self.most_pages - self.n_borrowed)

    def release(self, places: Sequence[Place]) -> None:
        """Let go of places."""
        for slab, index in places:
            slab.free.append(index)

    def wanted_back(self) -> list[Slab]:
        """Slabs that lenders want back; they have no places for others any more."""
        return [slab for slab in (*self._near, *self._far) if slab.is_wanted_back]

    def return_lent(self, is_all: bool = False) -> None:
        """Return what is lent and has no pages: what is wanted back, or all."""
        for slabs in (self._near, self._far):
            for slab in [*slabs]:
                if not slab.n_used and (is_all or slab.is_wanted_back):
                    slabs.remove(slab)
                    slab.close()

    def close(self) -> None:
        """Let go of all memory."""
        slabs = list(self._all)
        self._near, self._own, self._far = [], [], []
        for slab in slabs:
            slab.close()
        self._n_made, self.most_pages, self.may_borrow = 0, 0, False
        self._borrow = lambda rung, n_pages: None

    def _borrowed(self, rung: str) -> Slab | None:
        """A slab of a rung, or a smaller one; None if nothing is to be had."""
        return self._borrow(rung, _SLAB_PAGES) or self._borrow(rung, _LEAST_PAGES)

    def _made(self) -> Slab | None:
        """A slab of the host's memory; None if no more of it may be taken."""
        n_pages = min(_SLAB_PAGES, self.most_pages - self._n_made)
        if n_pages <= 0:
            return None
        try:
            slab = Slab(self._make(n_pages))
        except (MemoryError, RuntimeError):  # of torch: the host has no memory left
            self.most_pages = self._n_made
            return None
        self._n_made += n_pages
        return slab

    def validate(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        for slab in self._all:
            assert len(set(slab.free)) == len(slab.free) <= slab.n_pages
        assert self._n_made == sum(slab.n_pages for slab in self._own)
        assert self._n_made <= self.most_pages


def _take_from(slabs: Sequence[Slab], n_pages: int, found: list[Place]) -> None:
    """Take places of slabs until there are enough."""
    for slab in slabs:
        while slab.free and len(found) < n_pages and not slab.is_wanted_back:
            found.append((slab, slab.free.pop()))
