"""Futures that follow from others: results, errors, and cancelling in both directions."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import CancelledError, Future

import pytest

from dask_pcm.futures import then


def test_a_result_is_passed_on():
    before: Future[int] = Future()
    found = then(then(before, lambda n: n + 1), str)
    assert not found.done()
    before.set_result(4)
    assert found.result(0) == "5"
    assert not found.cancel() and not before.cancelled()


@pytest.mark.parametrize("is_raised_before", [True, False])
def test_an_error_is_passed_on(is_raised_before):
    before: Future[int] = Future()
    found = then(before, lambda n: 1 // n)
    if is_raised_before:
        before.set_exception(ZeroDivisionError())
    else:
        before.set_result(0)
    assert isinstance(found.exception(0), ZeroDivisionError)


@pytest.mark.parametrize("is_last", [True, False])
def test_cancelling_either_cancels_both(is_last):
    before: Future[int] = Future()
    found = then(then(before, abs), abs)
    assert (found if is_last else before).cancel()
    assert before.cancelled() and found.cancelled()
    with pytest.raises(CancelledError):
        found.result(0)


def test_cancelling_while_a_result_comes_ends_in_one_of_the_two(caplog):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            before: Future[int] = Future()
            found = then(then(before, abs), abs)

            def finish(of=before):
                if of.set_running_or_notify_cancel():
                    of.set_result(1)

            thread = threading.Thread(target=finish)
            thread.start()
            found.cancel()
            thread.join()
            assert found.cancelled() or found.result(5) == 1
    finally:
        sys.setswitchinterval(interval)
    assert not caplog.records  # as of a callback that has raised
