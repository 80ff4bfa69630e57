"""Memory off the device for pages, in slabs: of the host, or lent by a neighbour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

#: Pages of a slab of the host: few calls for memory, and little that is not used.
_SLAB_PAGES = 64


class Slab:
    """Room for some pages in one piece of memory.

    Parameters
    ----------
    memory
        A tensor, shape (pages, numbers of a page ...).

    Attributes
    ----------
    free
        Places that no page has.
    """

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.free = list(range(len(memory)))[::-1]

    @property
    def n_used(self) -> int:
        """Places that a page has."""
        return len(self.memory) - len(self.free)


#: Where a page is off the device: a slab, and the page's index in it.
Place: TypeAlias = tuple[Slab, int]


class Slabs:
    """Places for pages off the device; for one thread.

    Parameters
    ----------
    make
        Takes memory for a number of pages.
    most_pages
        Pages for which it may take memory.
    """

    def __init__(self, make: Callable[[int], Any], most_pages: int) -> None:
        self._make = make
        self._most_pages = most_pages
        self._slabs: list[Slab] = []
        self._n_made = 0

    @property
    def n_free(self) -> int:
        """Pages for which there is room, or memory that may be taken."""
        free = sum(len(slab.free) for slab in self._slabs)
        return free + self._most_pages - self._n_made

    @property
    def n_used(self) -> int:
        """Pages that are there."""
        return sum(slab.n_used for slab in self._slabs)

    def take(self, n_pages: int) -> list[Place] | None:
        """Places for pages; None if there is no room for all of them."""
        if n_pages > self.n_free:
            return None
        found: list[Place] = []
        for slab in self._slabs:
            while slab.free and len(found) < n_pages:
                found.append((slab, slab.free.pop()))
        while len(found) < n_pages:
            try:
                slab = self._add()
            except (MemoryError, RuntimeError):  # of torch: the host has no memory left
                self.release(found)
                self._most_pages = self._n_made
                return None
            while slab.free and len(found) < n_pages:
                found.append((slab, slab.free.pop()))
        return found

    def release(self, places: Sequence[Place]) -> None:
        """Let go of places."""
        for slab, index in places:
            slab.free.append(index)

    def close(self) -> None:
        """Let go of all memory."""
        self._slabs, self._n_made, self._most_pages = [], 0, 0

    def _add(self) -> Slab:
        n_pages = min(_SLAB_PAGES, self._most_pages - self._n_made)
        slab = Slab(self._make(n_pages))
        self._slabs.append(slab)
        self._n_made += n_pages
        return slab

    def validate(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        for slab in self._slabs:
            assert len(set(slab.free)) == len(slab.free) <= len(slab.memory)
        assert self._n_made == sum(len(slab.memory) for slab in self._slabs)
        assert self._n_made <= self._most_pages
