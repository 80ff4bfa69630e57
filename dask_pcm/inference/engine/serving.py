"""One engine for a context on a worker: a thread that computes the rows of all its tasks."""

from __future__ import annotations

import functools
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from dask_pcm.errors import LoadError
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.requests import Request, Requests
from dask_pcm.inference.engine.rows import Generated, Row
from dask_pcm.inference.engine.slabs import Borrow

logger = logging.getLogger(__name__)

_CLOSED = "The engine accepts no rows: its context leaves the device."


class EngineClosedError(LoadError):
    """The engine was closed while it had rows: its context leaves the device."""


class Serving:
    """Serves requests of several rows with an engine.

    An ``Attendant``, ``Drafting``, ``Borrowing`` and ``Stopping``: see ``ladder/residency.py``.

    Methods may be called from any thread.

    Parameters
    ----------
    make
        Makes the engine, and takes its memory.
    n_bytes, n_rows, host_bytes
        See ``Attendant``.
    live
        The live object that it serves.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        n_bytes: int,
        n_rows: int,
        live: Any = None,
        host_bytes: int = 0,
    ) -> None:
        self.n_bytes = n_bytes
        self.n_rows = n_rows
        self.host_bytes = host_bytes
        self._live = live
        self._make = make
        self._changed = threading.Condition()
        self._requests = Requests()
        #: Threads whose next request is accepted at once.
        self._promised: set[int] = set()
        #: By thread: what its rows go on from.
        self._drafts: dict[int, Mapping[int, Sequence[int]]] = {}
        self._alone: int | None = None
        #: Whether the engine computes at this moment.
        self._is_at_work = False
        self._is_open = False
        self._is_draining = False
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._borrow: Borrow | None = None
        self._on_stopped: Callable[[], None] = lambda: None
        #: Whether a lender wants memory back.
        self._is_called = False
        #: CPU threads that torch uses; its number belongs to each thread that calls it.
        self._n_threads = 1

    @property
    def live(self) -> Any:
        """The live object that it serves; EngineClosedError once it is closed."""
        if not self._is_open:
            raise EngineClosedError(_CLOSED)
        return self._live

    def start(self) -> None:
        """See ``Attendant``."""
        engine = self._engine = self._make()
        if self._borrow is not None:
            engine.paging.lend(self._borrow, self._call)
        self._n_threads = _n_threads()
        self._is_open = True
        self._thread = threading.Thread(
            target=self._serve, args=(engine,), name="pcm-engine", daemon=True
        )
        self._thread.start()

    def on_stopped(self, call: Callable[[], None]) -> None:
        """See ``Stopping``."""
        self._on_stopped = call

    def lend(self, borrow: Borrow) -> None:
        """See ``Borrowing``."""
        self._borrow = borrow

    def n_waiting(self) -> int:
        """See ``Borrowing``."""
        engine = self._engine
        return 0 if engine is None else engine.n_waiting

    def needed_bytes(self) -> int:
        """See ``Borrowing``."""
        engine = self._engine
        return 0 if engine is None else engine.paging.n_bytes

    def _call(self) -> None:
        """A lender wants memory back; on any thread."""
        with self._changed:
            self._is_called = True
            self._changed.notify_all()

    def submit(self, request: Sequence[Row]) -> Future[list[Any]]:
        """Compute rows; the result has that of each in their order, ``RowError`` for some perhaps.

        Waits while there are as many rows as the engine wants, or another thread has it alone. If
        the future is cancelled, its rows are computed no further.

        Raises
        ------
        EngineClosedError
            The engine accepts nothing any more.
        """
        future, made = self._made(request, threading.get_ident())
        if not request:
            future.set_result([])
            return future
        with self._changed:
            self._changed.wait_for(lambda: not self._is_open or self._is_admitted())
            self._promised.discard(threading.get_ident())
            if not self._is_open or self._is_draining:
                raise EngineClosedError(_CLOSED)
            drafts = self._drafts.get(threading.get_ident(), {})
            for row in request if drafts else ():
                if isinstance(row, Generated) and row.key is not None and row.key in drafts:
                    row.resume(drafts[row.key])
            self._requests.add(future, made)
            self._n_threads = _n_threads()
            self._changed.notify_all()
        future.add_done_callback(self._withdraw)
        return future

    def ask(self, row: Row) -> Future[list[Any]]:
        """Compute a row of a question: as ``submit``, but never waits, so for any thread.

        While a thread has the engine alone, the row waits in the engine.
        """
        future, made = self._made([row], None)
        with self._changed:
            if not self._is_open or self._is_draining:
                raise EngineClosedError(_CLOSED)
            self._requests.add(future, made, is_held_back=self._alone is not None)
            self._changed.notify_all()
        future.add_done_callback(self._withdraw)
        return future

    def wait_for_room(self, timeout_s: float | None) -> bool:
        """See ``Drafting``."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: not self._is_open or self._is_admitted(), timeout_s
            )
            if found:
                self._promised.add(threading.get_ident())
            return found

    def drafts(self) -> dict[int, list[int]]:
        """See ``Drafting``."""
        with self._changed:
            rows = self._requests.rows_of(threading.get_ident())
        # The engine's thread appends meanwhile: what it has by now is a draft as well.
        found: dict[int, list[int]] = {}
        for row in rows:
            if isinstance(row, Generated) and row.key is not None and row.new:
                found.setdefault(row.key, row.new)  # of equal prompts, always the same one
        return found

    def resume(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """See ``Drafting``."""
        with self._changed:
            self._drafts.pop(threading.get_ident(), None)
            if drafts:
                self._drafts[threading.get_ident()] = drafts

    def hungry(self) -> int:
        """See ``Attendant``."""
        with self._changed:
            return max(0, self.n_rows - self._requests.n_missing)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See ``Attendant``; waits until what is in flight has ended."""
        me = threading.get_ident()
        if self._alone == me:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._alone is None or not self._is_open)
            self._alone = me
        try:
            with self._changed:
                self._changed.wait_for(self._is_idle)
            yield
        finally:
            with self._changed:
                self._alone = None
                self._requests.release()
                self._changed.notify_all()

    def drain(self) -> None:
        """See ``Attendant``."""
        with self._changed:
            self._is_draining = True
            self._changed.wait_for(self._is_idle)

    def close(self) -> None:
        """See ``Attendant``."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._live, self._make = None, _closed  # neither refers to the model any more

    def _made(self, rows: Sequence[Row], thread: int | None) -> tuple[Future[list[Any]], Request]:
        """A request of a thread, and its future."""
        future: Future[list[Any]] = Future()
        made = Request(thread, [*rows], [None] * len(rows), len(rows))
        for k, row in enumerate(rows):
            row.done = functools.partial(self._note, future, made, k)
        return future, made

    def _is_idle(self) -> bool:
        """Whether the engine has nothing to do, and does nothing; with the lock held."""
        return not (self._requests or self._is_at_work) or not self._is_open

    def _is_admitted(self) -> bool:
        """Whether this thread's rows are taken now; with the lock held."""
        if self._alone is not None:
            return self._alone == threading.get_ident()
        is_promised = threading.get_ident() in self._promised
        return self._is_draining or is_promised or self._requests.n_missing < self.n_rows

    def _note(self, future: Future[list[Any]], request: Request, k: int, result: Any) -> None:
        """A row has ended; on the engine's thread."""
        request.found[k] = result
        with self._changed:
            if not self._requests.end_row(future):
                return
            self._changed.notify_all()
        if future.set_running_or_notify_cancel():
            future.set_result(request.found)

    def _withdraw(self, future: Future[list[Any]]) -> None:
        """A request has ended; if it was cancelled, its rows go."""
        if future.cancelled():
            with self._changed:
                self._requests.withdraw(future)
                self._changed.notify_all()

    def _serve(self, engine: Engine) -> None:
        """Compute steps while there are rows; the engine's thread."""
        import torch

        error: BaseException = EngineClosedError("The engine was closed; its rows run again")
        has_failed = False
        try:
            while True:
                with self._changed:
                    self._is_at_work = False
                    if self._alone is not None or self._is_draining:
                        self._changed.notify_all()
                    self._changed.wait_for(
                        lambda: (
                            self._requests.has_news
                            or engine.n_rows
                            or self._is_called
                            or not self._is_open
                        )
                    )
                    if not self._is_open:
                        break
                    is_called, self._is_called = self._is_called, False
                    new, withdrawn = self._requests.take()
                    n_threads, self._is_at_work = self._n_threads, True
                if n_threads != _n_threads():
                    torch.set_num_threads(n_threads)
                if is_called:
                    engine.evacuate()
                engine.add(new)
                engine.drop(withdrawn)
                engine.step()
                if not engine.n_rows:
                    engine.paging.slabs.return_lent(is_all=True)
        except BaseException as raised:  # of the device, or a fault of ours: no step is possible
            # As a text, and without the traceback: that refers to the engine.
            logger.warning("The engine has stopped:\n%s", traceback.format_exc())
            error = raised.with_traceback(None)
            has_failed = True
        engine.close()
        self._engine = None
        with self._changed:
            self._is_open = self._is_at_work = False
            left = self._requests.close()
            self._changed.notify_all()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        if has_failed:
            self._on_stopped()


def _closed() -> Engine:
    raise EngineClosedError(_CLOSED)


def _n_threads() -> int:
    """CPU threads that torch uses on behalf of this thread."""
    import torch

    return int(torch.get_num_threads())
