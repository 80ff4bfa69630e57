"""Limits of a worker that holds weights, whatever goes wrong and however many load."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace

import psutil
import pytest

from dask_pcm.plugins.worker.memory import MemoryAllowance
from tests.support.patience import patient

LIMIT, ALL = 1 << 30, psutil.virtual_memory().total


class Told:
    """A nanny that is told of limits."""

    def __init__(self):
        self.n_bytes, self.before = [], lambda n_bytes: None

    def ask(self, op, n_bytes):
        self.before(n_bytes)
        self.n_bytes.append(n_bytes)


@pytest.fixture
def worker():
    return SimpleNamespace(memory_manager=SimpleNamespace(memory_limit=LIMIT))


def fail_once(monkeypatch, owner, name, real):
    def fail(*args, **kwargs):
        monkeypatch.setattr(owner, name, real)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("when", ["before", "while telling"])
def test_an_error_at_the_beginning_leaves_the_limit_as_it_was(worker, monkeypatch, when):
    told = Told()
    memory = MemoryAllowance(worker, told)
    if when == "before":
        fail_once(monkeypatch, psutil, "Process", psutil.Process)
    else:
        fail_once(monkeypatch, told, "ask", told.ask)
    with pytest.raises(OSError, match="Too many"), memory.growing("a", lambda digest: 0):
        raise AssertionError
    assert worker.memory_manager.memory_limit == LIMIT
    with memory.growing("a", lambda digest: 1 << 40):
        assert worker.memory_manager.memory_limit == LIMIT + ALL
    assert worker.memory_manager.memory_limit == LIMIT + (1 << 40)
    memory.freed("a")
    assert worker.memory_manager.memory_limit == LIMIT
    assert told.n_bytes[-1] == 0


def test_what_an_attendant_may_take_later_counts_from_the_beginning(worker):
    told = Told()
    memory = MemoryAllowance(worker, told)
    with memory.growing("a", lambda digest: 1 << 40, lambda digest: 1 << 30):
        pass
    assert told.n_bytes[-1] == (1 << 40) + (1 << 30)
    memory.freed("a")
    assert told.n_bytes[-1] == 0


def test_what_is_borrowed_raises_the_limits_as_long_as_it_is(worker):
    told = Told()
    memory = MemoryAllowance(worker, told)
    for n_bytes in (1 << 20, 3 << 20, 0):
        memory.set_taken("borrowed memory", n_bytes)
        assert worker.memory_manager.memory_limit == LIMIT + n_bytes
    assert told.n_bytes == [1 << 20, 3 << 20, 0]


def test_whoever_tells_last_knows_most(worker):
    """A load has ended and its nanny is slow to hear of it; in that moment another begins."""
    told = Told()
    memory = MemoryAllowance(worker, told)
    is_telling, may_end, has_begun, is_over = (threading.Event() for _ in range(4))

    def slowly(n_bytes):
        if n_bytes < ALL:
            is_telling.set()
            assert may_end.wait(patient(10))

    def load(digest, then):
        with memory.growing(digest, lambda digest: 0):
            then()

    def stay():
        has_begun.set()
        assert is_over.wait(patient(10))

    told.before = slowly
    one = threading.Thread(target=load, args=("one", lambda: None))
    other = threading.Thread(target=load, args=("other", stay))
    one.start()
    assert is_telling.wait(patient(10))
    other.start()
    has_begun.wait(0.3)  # it would, if it did not wait
    may_end.set()
    assert has_begun.wait(patient(10))
    one.join()
    assert told.n_bytes[-1] == ALL
    assert worker.memory_manager.memory_limit == LIMIT + ALL
    is_over.set()
    other.join()
    assert told.n_bytes[-1] < ALL
