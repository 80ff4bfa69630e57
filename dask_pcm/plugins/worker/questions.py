"""Questions to the contexts of a worker, answered beside its tasks: no lane and no task is needed.

One thread of its own serves all of them: it holds the context and sends what is new of an answer.
So neither the event loop nor the thread of an engine waits for it. A second one begins questions,
one at a time: tokenising a long prompt takes seconds.
"""

from __future__ import annotations

import functools
import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from distributed.threadpoolexecutor import ThreadPoolExecutor

from dask_pcm.errors import LoadError, PromptError, redacted
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.plugins.questions import FAILED, MOVED, REFUSED
from dask_pcm.plugins.worker.contexts import WorkerContexts

logger = logging.getLogger(__name__)

#: Between two messages of an answer, in seconds: at least the first, and as many times what sending
#: takes, since that is taken from the engine; at most the last. Its end waits for the first alone.
EVERY_S, _RATIO, _LONGEST_S = 0.05, 20.0, 0.5
#: How long the end of a worker waits for answers that cannot be interrupted.
_CLOSING_S = 5.0


@dataclass(frozen=True, slots=True)
class News:
    """What is new of an answer.

    Attributes
    ----------
    tokens, text
        New tokens, and the text that is settled by them.
    end
        How it has ended; None while it goes on.
    """

    tokens: list[int]
    text: str
    end: Mapping[str, Any] | None = None


class Answer(Protocol):
    """An answer that is being computed."""

    def take(self) -> News:
        """What is new since the last call; raises what the answer has failed with."""

    def cancel(self, then: Callable[[], None]) -> None:
        """Compute it no further, and call `then` once that is so: at once, or on any thread."""


class Question(Protocol):
    """A question: arrives pickled, and knows how its context answers it."""

    def begin(
        self,
        served: Any,
        wake: Callable[..., None],
        apart: Callable[[Callable[[], Any]], Future[Any]],
    ) -> Answer:
        """Begin the answer.

        Parameters
        ----------
        served
            The attendant of the context, or the live object if it has none.
        wake
            Called, from any thread, when there is something to take; with True if that is the end.
        apart
            Computes something that takes long on another thread.
        """


@dataclass(slots=True, eq=False)
class _Open:
    """A question that was begun here."""

    id: str
    attempt: int
    let_go: Callable[[], None]
    #: None while it is begun.
    answer: Answer | None = None
    #: Whether there is something to take; set by any thread.
    has_news: threading.Event = field(default_factory=threading.Event)
    number: int = 0
    sent_at: float = 0.0
    wait_s: float = 0.0
    #: Whether nothing follows what there is to take; set by any thread.
    is_last: bool = False

    @property
    def next_at(self) -> float:
        """When its next message may be sent."""
        return self.sent_at + (EVERY_S if self.is_last else self.wait_s)


class Questions:
    """Answers questions on a thread of its own.

    Parameters
    ----------
    tell
        Sends a message to the scheduler; may be called from any thread.
    restart
        Replaces this process, whose device has failed; may be called from any thread.
    """

    def __init__(
        self,
        contexts: WorkerContexts,
        tell: Callable[[dict[str, Any]], None],
        restart: Callable[[str], None],
    ) -> None:
        self._contexts = contexts
        self._tell = tell
        self._restart = restart
        self._open: dict[str, _Open] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._beginner: ThreadPoolExecutor | None = None
        self._apart: ThreadPoolExecutor | None = None
        self._is_closed = False
        #: Contexts that are held, a time for each question.
        self._n_held = 0

    @property
    def is_busy(self) -> bool:
        """Whether a question is open; for any thread."""
        return bool(self._open or self._calls)

    def on_ask(self, id: str, attempt: int, digest: str, question: bytes, **kwargs: Any) -> None:
        """The gate sends a question to a context that is warm here."""
        self._call(lambda: self._begin(id, attempt, digest, question))

    def on_cancel(self, id: str, **kwargs: Any) -> None:
        """The client is gone, or does not wait any more."""
        self._call(lambda: self._cancel(id))

    def move(self) -> None:
        """Have all open questions asked again elsewhere: this worker is about to leave."""
        self._call(lambda: self._move("the worker leaves"))

    def close(self) -> None:
        """End all answers, and the thread; the gate tells the clients."""
        self._is_closed = True
        self._changed.set()

    def _call(self, call: Callable[[], None]) -> None:
        """Call something on the thread; on the event loop."""
        if self._is_closed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pcm-questions", daemon=True)
            self._thread.start()
        self._call_soon(call)

    def _call_soon(self, call: Callable[[], None]) -> None:
        """Call something on the thread, which runs; from any thread."""
        self._calls.append(call)
        self._changed.set()

    # -- on the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        """Begin what is asked and send what is new, until it is closed."""
        while not self._is_closed:
            self._changed.wait(self._wait_s())
            self._changed.clear()
            while self._calls:
                self._tried(self._calls[0])
                self._calls.popleft()  # after the call: the worker counts as busy meanwhile
            for one in list(self._open.values()):
                if one.has_news.is_set() and time.monotonic() >= one.next_at:
                    self._tried(functools.partial(self._send, one))
        for one in list(self._open.values()):
            self._tried(functools.partial(self._end, one))
        for executor in (self._beginner, self._apart):
            if executor is not None:
                executor.shutdown(wait=False)
        # Contexts are let go of all the same: their store closes them once nothing holds them.
        while self._calls or self._n_held:
            while self._calls:
                self._tried(self._calls.popleft())
            if self._n_held and not self._changed.wait(_CLOSING_S):
                break
            self._changed.clear()

    def _tried(self, call: Callable[[], None]) -> None:
        """Call something; what it raises, such as a close hook, ends no other question."""
        try:
            call()
        except Exception:
            if not self._is_closed:  # else the worker's loop may have ended
                logger.exception("A question could not be served")

    def _wait_s(self) -> float | None:
        """Seconds until something that is new may be sent; None while nothing is new."""
        times = [one.next_at for one in self._open.values() if one.has_news.is_set()]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _begin(self, id: str, attempt: int, digest: str, question: bytes) -> None:
        try:
            held, why = self._contexts.store.hold_warm(digest), "it is not warm here"
        except Exception as error:
            logger.exception("A question could not be begun")
            held, why = None, redacted(str(error))
        if held is None:
            self._say(id, attempt, 0, News([], "", {"end": MOVED, "why": why}))
            return
        live, attendant, let_go = held
        self._n_held += 1
        one = self._open[id] = _Open(id, attempt, let_go)

        def wake(is_last: bool = False) -> None:
            one.is_last = one.is_last or is_last
            if is_last or not one.has_news.is_set():  # one call for all tokens of a message
                one.has_news.set()
                self._changed.set()

        def begin() -> Answer:
            self._contexts.set_threads()
            asked: Question = pickle.loads(question)
            return asked.begin(live if attendant is None else attendant, wake, self._run_apart)

        if self._beginner is None:
            self._beginner = ThreadPoolExecutor(1, thread_name_prefix="pcm-question")
        began: Future[Answer] = self._beginner.submit(begin)
        began.add_done_callback(
            lambda began: self._call_soon(functools.partial(self._begun, one, began))
        )

    def _begun(self, one: _Open, began: Future[Answer]) -> None:
        """A question was begun, or cannot be; or it has ended meanwhile."""
        is_open = self._open.get(one.id) is one
        if (error := began.exception()) is not None:
            self._let_go(one)
            if is_open:
                del self._open[one.id]
                self._say(one.id, one.attempt, 0, News([], "", self._failure(error)))
            return
        one.answer = began.result()
        if is_open:
            one.has_news.set()
        else:
            self._cancel_answer(one)

    def _send(self, one: _Open) -> None:
        begun = time.thread_time()
        one.has_news.clear()  # first: what comes from now on is new again
        if one.answer is None:  # its first token came before it was begun
            return
        try:
            news = one.answer.take()
        except BaseException as error:
            news = News([], "", self._failure(error))
        if not (news.tokens or news.text or news.end):
            return
        if news.end is not None:
            self._end(one)  # first: once the client has the answer, nothing of it is left here
        self._say(one.id, one.attempt, one.number, news)
        one.number += 1
        wait_s = _RATIO * (time.thread_time() - begun) * len(self._open)
        one.sent_at, one.wait_s = time.monotonic(), min(max(EVERY_S, wait_s), _LONGEST_S)

    def _say(self, id: str, attempt: int, number: int, news: News) -> None:
        about = {"id": id, "attempt": attempt, "number": number}
        self._tell(
            {"op": "pcm-answer", **about, "tokens": news.tokens, "text": news.text}
            | ({} if news.end is None else {"end": dict(news.end)})
        )

    def _end(self, one: _Open) -> None:
        """Forget a question; its context is let go of once nothing computes with it."""
        self._open.pop(one.id, None)
        if one.answer is not None:  # else once it is begun
            self._cancel_answer(one)

    def _cancel_answer(self, one: _Open) -> None:
        assert one.answer is not None

        def let_go() -> None:
            if threading.current_thread() is self._thread:
                self._let_go(one)
            else:
                self._call_soon(functools.partial(self._let_go, one))

        one.answer.cancel(let_go)

    def _let_go(self, one: _Open) -> None:
        """Let go of the context of a question, on the thread that holds it."""
        self._n_held -= 1
        one.let_go()

    def _cancel(self, id: str) -> None:
        if (one := self._open.get(id)) is not None:
            self._end(one)

    def _move(self, why: str) -> None:
        for one in list(self._open.values()):
            self._end(one)
            self._say(one.id, one.attempt, one.number, News([], "", {"end": MOVED, "why": why}))

    def _failure(self, error: BaseException) -> dict[str, Any]:
        """How an answer ends by an error, as the client is told."""
        text = redacted(str(error))
        if isinstance(error, LoadError):  # an engine that is closed: its context leaves the device
            return {"end": MOVED, "why": text}
        if isinstance(error, PromptError):
            return {"end": REFUSED, "why": text}
        if is_sticky(error):
            self._restart(f"its device failed while a question was answered ({error})")
            return {"end": MOVED, "why": text}
        logger.warning("A question has failed", exc_info=error)
        return {"end": FAILED, "why": f"{type(error).__name__}: {text}"}

    def _run_apart(self, call: Callable[[], Any]) -> Future[Any]:
        """Compute something that takes long; one such call at a time, as padded batches are."""
        if self._apart is None:
            self._apart = ThreadPoolExecutor(1, thread_name_prefix="pcm-answer")

        def compute() -> Any:
            self._contexts.set_threads()
            return call()

        future: Future[Any] = self._apart.submit(compute)
        return future
