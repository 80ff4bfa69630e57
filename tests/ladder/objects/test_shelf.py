"""Which memory files stay within a budget."""

from __future__ import annotations

import os

import pytest

from dask_pcm.ladder.objects.shelf import Shelf


@pytest.fixture
def keep():
    """Keeps files of a size."""
    made = []

    def keep(shelf, name, n_bytes, owner=None):
        fd = os.memfd_create("a test")
        made.append(fd)
        os.ftruncate(fd, n_bytes)
        return shelf.keep(name, f"/proc/{os.getpid()}/fd/{fd}", n_bytes, owner)

    yield keep
    for fd in made:
        os.close(fd)


def names(shelf):
    return [name for name in "abcdef" if shelf.find(name) is not None]


def test_what_is_pinned_makes_no_room(keep):
    shelf = Shelf(10)
    assert keep(shelf, "a", 4) and keep(shelf, "b", 4, owner="one")
    assert keep(shelf, "c", 4)
    assert names(shelf) == ["b", "c"]
    assert shelf.pin("c", "two") and not shelf.pin("a", "two")
    assert keep(shelf, "d", 4) is False
    assert names(shelf) == ["b", "c"]
    shelf.unpin("c", "two")
    assert keep(shelf, "d", 4)
    assert names(shelf) == ["b", "d"]


def test_nothing_is_dropped_for_what_cannot_fit_anyway(keep):
    shelf = Shelf(10)
    assert keep(shelf, "a", 4, owner="one") and keep(shelf, "b", 4)
    assert keep(shelf, "c", 7) is False
    assert names(shelf) == ["a", "b"]


def test_a_file_stays_as_long_as_any_process_depends_on_it(keep):
    shelf = Shelf(10)
    assert keep(shelf, "a", 4)
    assert shelf.pin("a", "one") and shelf.pin("a", "two")
    shelf.drop("a", "one")
    shelf.unpin("a", "one")
    assert names(shelf) == ["a"]
    shelf.drop("a", "two")
    assert names(shelf) == []


def test_a_process_that_has_ended_leaves_only_what_its_successor_can_use(keep):
    shelf = Shelf(100)
    assert keep(shelf, "a", 4) and shelf.pin("a", "one")
    assert keep(shelf, "b", 4, owner="one") and keep(shelf, "c", 4, owner="two")
    shelf.unpin("b", "one")  # back on its device, a copy of it is here still
    shelf.leave("one")
    assert names(shelf) == ["a", "c"]
    assert keep(shelf, "d", 96)
    assert names(shelf) == ["c", "d"]
