"""Futures of ``concurrent.futures`` that follow from others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def then(before: Future[S], compute: Callable[[S], T]) -> Future[T]:
    """What a function makes of a future's result; if either is cancelled, so is the other."""
    found: Future[T] = Future()

    def finish(ended: Future[S]) -> None:
        if ended.cancelled():
            found.cancel()
        elif found.set_running_or_notify_cancel():
            try:
                found.set_result(compute(ended.result()))
            except BaseException as error:
                found.set_exception(error)

    before.add_done_callback(finish)
    found.add_done_callback(lambda ended: ended.cancelled() and before.cancel())
    return found
