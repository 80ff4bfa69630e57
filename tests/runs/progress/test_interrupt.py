"""Ctrl-C while a run drives."""

from __future__ import annotations

import signal
import threading

import pytest

from dask_pcm.runs.progress.interrupt import deferred


def ask():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def heeded():
    """Whoever starts the tests in the background of a shell has them ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_it_is_raised_where_it_suits():
    said = []
    with pytest.raises(KeyboardInterrupt), deferred() as interrupt_if_asked:
        interrupt_if_asked()
        ask()
        said.append("went on")
        interrupt_if_asked()
        said.append("never")
    assert said == ["went on"]


def test_asked_at_the_very_end_it_is_not_forgotten():
    said = []
    with pytest.raises(KeyboardInterrupt), deferred(lambda: said.append("later")):
        ask()
        assert said == ["later"]


def test_a_second_one_is_raised_where_it_comes():
    with pytest.raises(KeyboardInterrupt), deferred():
        ask()
        ask()
        raise AssertionError


def test_elsewhere_and_where_others_handle_it_nothing_changes():
    def other(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGINT, other)
    with pytest.raises(TimeoutError), deferred():
        ask()
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def elsewhere():
        with deferred() as interrupt_if_asked:
            interrupt_if_asked()
            done.append(True)

    done = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [True]
