"""The requests that an engine has not answered, and what of them it does not know yet."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dask_pcm.inference.engine.rows import Row


@dataclass(slots=True, eq=False)
class Request:
    """Rows that were submitted together, by a thread; None for a question, which has none."""

    thread: int | None
    rows: list[Row]
    found: list[Any]
    n_missing: int


class Requests:
    """Requests by their futures; to be used with the lock of ``Serving`` held."""

    def __init__(self) -> None:
        self._open: dict[Future[list[Any]], Request] = {}
        self._new: list[Row] = []
        #: Rows of questions that were asked while a thread had the engine alone.
        self._held_back: list[Row] = []
        #: Rows whose request was cancelled.
        self._withdrawn: list[Row] = []

    def __bool__(self) -> bool:
        # What is held back, a row a request, is not in the engine: a thread that waits to have it
        # alone does not wait for that.
        return bool(self._withdrawn) or len(self._open) > len(self._held_back)

    @property
    def n_missing(self) -> int:
        """Rows of tasks without a result."""
        return sum(one.n_missing for one in self._open.values() if one.thread is not None)

    @property
    def has_news(self) -> bool:
        """Whether there is something for `take`."""
        return bool(self._new or self._withdrawn)

    def add(self, future: Future[list[Any]], request: Request, is_held_back: bool = False) -> None:
        """Add a request; its rows are no news before ``release`` if it is held back."""
        self._open[future] = request
        if is_held_back:
            self._held_back += request.rows
        else:
            self._new += request.rows

    def release(self) -> None:
        """What was held back is new from now on."""
        self._new += self._held_back
        self._held_back = []

    def take(self) -> tuple[list[Row], list[Row]]:
        """New rows, and those that were cancelled, since the last call."""
        news = self._new, self._withdrawn
        self._new, self._withdrawn = [], []
        return news

    def end_row(self, future: Future[list[Any]]) -> bool:
        """A row has its result; return whether its request has ended with it, and is not gone."""
        request = self._open.get(future)
        if request is None:
            return False
        request.n_missing -= 1
        if request.n_missing:
            return False
        del self._open[future]
        request.rows = []  # which refer to the request
        return True

    def withdraw(self, future: Future[list[Any]]) -> None:
        """A request was cancelled."""
        request = self._open.pop(future, None)
        if request is not None:
            self._withdrawn += request.rows
            gone = {id(row) for row in request.rows}
            self._held_back = [row for row in self._held_back if id(row) not in gone]
            request.rows = []

    def close(self) -> list[Future[list[Any]]]:
        """Forget all requests, and return their futures."""
        for request in self._open.values():
            request.rows = []
        left = list(self._open)
        self._open.clear()
        self.release()
        self.take()
        return left

    def rows_of(self, thread: int) -> Sequence[Row]:
        """Rows of the requests of a thread."""
        return [row for one in self._open.values() if one.thread == thread for row in one.rows]
