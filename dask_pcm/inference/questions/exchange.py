"""A question on its client: asked, and asked again with its draft where its worker is lost."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

from distributed import Client

from dask_pcm.context.context import ContextRef
from dask_pcm.errors import (
    AskError,
    DeviceMemoryError,
    InstallError,
    LoadError,
    PCMError,
    PromptError,
)
from dask_pcm.inference.questions.mailbox import Inbox, Message, mailbox_of
from dask_pcm.inference.questions.question import Question
from dask_pcm.inference.questions.reply import Reply
from dask_pcm.plugins.install import NOT_INSTALLED_TEXT
from dask_pcm.plugins.questions import (
    DONE,
    DUPLICATE,
    FAILED,
    FOREIGN,
    LOST,
    MOVED,
    NOT_INSTALLED,
    NOT_LOADED,
    REFUSED,
    TOO_LARGE,
    UNKNOWN,
)
from dask_pcm.runs.gate_link import lack_of_workers
from dask_pcm.runs.progress.progress import span

logger = logging.getLogger(__name__)

#: Lost workers in succession, each with fewer new tokens, after which a question is given up.
MAX_LOST, _GROWN = 3, 16
#: Times that a question may be moved without a new token between.
_MAX_MOVED = 10
#: Waits before it is asked again: the first, each twice as long, and the longest.
_AGAIN_S, _LONGEST_S = 0.05, 2.0
#: How often the gate is asked how a question stands of which nothing is heard.
_LOOK_S = 1.0
#: The user is told of what has been missing for this long.
_LACK_S = 10.0
#: Requests in succession that may break while the client is connected.
_MAX_BROKEN = 10
#: Looks at which the gate does not know a question: then its end was lost on the way.
_MAX_UNKNOWN = 2


class Exchange:
    """One question: what it has been told so far, and what is to be done next.

    For one thread or event loop at a time; `inbox` takes messages from any thread.

    Parameters
    ----------
    timeout_s
        Seconds that the answer may take; None for no limit.

    Attributes
    ----------
    text, tokens
        What has arrived.
    reply
        The whole answer; None until it is there.
    note
        What it waits for, in words; "" if nothing.
    """

    def __init__(
        self, client: Client, ref: ContextRef, question: Question, timeout_s: float | None
    ) -> None:
        self.id = uuid.uuid4().hex
        self.inbox = Inbox()
        self.text = ""
        self.tokens: list[int] = []
        self.reply: Reply | None = None
        self.note = ""
        self.client = client
        self._ref = ref
        self._question = question
        self._timeout_s = timeout_s
        self._is_closed = False
        self._attempt = self._number = 0
        self._n_lost = self._n_moved = self._n_unknown = self._n_broken = 0
        self._n_tokens_at_loss = 0
        self._address = client.scheduler.address if client.scheduler else "its address"
        #: Workers that could not go on with it since its last token.
        self._avoided: set[str] = set()
        self._begun_at = self._looked_at = self._had_workers_at = time.monotonic()
        self._again_at: float | None = None
        self._n_most = 0
        self._has_lacked = False
        self._first_at: float | None = None
        self._mailbox = mailbox_of(client)
        self._mailbox.open(self.id, self.inbox)
        self._ask()

    @property
    def is_open(self) -> bool:
        """Whether more is to come."""
        return self.reply is None and not self._is_closed

    @property
    def patience_s(self) -> float:
        """How long to wait for the next message, before ``take`` is called without one."""
        times = [self._looked_at + _LOOK_S if self._again_at is None else self._again_at]
        if self._timeout_s is not None:
            times.append(self._begun_at + self._timeout_s)
        return max(0.0, min(times) - time.monotonic())

    def take(self, message: Message | None) -> str:
        """Take in a message, or None if there was none; return the new text.

        Raises
        ------
        PCMError
            The question has no answer.
        TimeoutError
            It has none in time.
        """
        if message is None:
            self._look()
            return ""
        if message["attempt"] != self._attempt:
            return ""  # of a worker that was given up, or of ``close``
        if "standing" in message:
            self._take_standing(message["standing"])
            return ""
        return self._take_news(message)

    def close(self) -> None:
        """Have the answer computed no further, unless it is there; for any thread, never waits."""
        if self._is_closed:
            return
        self._is_closed = True
        self._mailbox.close(self.id)
        self.inbox.put({"attempt": 0})  # what waits for a message waits no more
        if self.reply is None:
            with suppress(RuntimeError):  # the client's loop has ended, and with it the question
                self._call("pcm_unask", lambda answer: None, id=self.id, client=self.client.id)

    # -- what arrives ---------------------------------------------------------------------------

    def _take_news(self, message: Message) -> str:
        end = message.get("end")
        if message.get("number", self._number) != self._number:
            # Some of the answer was lost: this client was not connected for a moment.
            self._take_end(MOVED, "a part of the answer was lost on the way")
            return ""
        self._number += 1
        if message["tokens"] or message["text"]:
            self._n_moved = self._n_unknown = 0
            self._avoided.clear()
            self.note = ""
            self._first_at = self._first_at or message.get("at")
        self.tokens += message["tokens"]
        self.text += message["text"]
        self._looked_at = time.monotonic()
        if end is not None:
            self._take_end(**end, worker=message.get("worker", ""), at=message.get("at"))
        return str(message["text"])

    def _take_end(
        self, end: str, why: str = "", worker: str = "", at: float | None = None, **about: Any
    ) -> None:
        if worker:
            self._avoided.add(worker)
        if end == DONE:
            ended_at = time.monotonic() if at is None else at
            first_s = (self._first_at or ended_at) - self._begun_at
            total_s = ended_at - self._begun_at
            # Bytes that no character begins with may have changed what was before them.
            self.text = about.pop("text", self.text)
            self.reply = Reply(self.text, **about, first_s=first_s, total_s=total_s)
            return
        if end == LOST:
            if len(self.tokens) >= self._n_tokens_at_loss + _GROWN:
                self._n_lost = 0
            self._n_lost, self._n_tokens_at_loss = self._n_lost + 1, len(self.tokens)
            if self._n_lost > MAX_LOST:
                raise AskError(
                    f"The question was given up: {self._n_lost} workers in succession were lost"
                    f" while they answered it ({why}). It may be what ends them; see their logs."
                )
            self._ask_again()
            return
        if end == MOVED:
            self._n_moved += 1
            if self._n_moved > _MAX_MOVED:
                raise AskError(
                    f"The question was given up: {self._n_moved} times in succession, a worker"
                    f" could not go on with it ({why})."
                )
            self._ask_again()
            return
        raise self._error(end, why)

    def _take_standing(self, standing: Message | BaseException | None) -> None:
        """The gate's answer to a request."""
        if isinstance(standing, BaseException):
            self._take_broken(standing)
            return
        self._n_broken = 0
        if standing is None:  # what Dask answers where it has no such handler
            raise InstallError(NOT_INSTALLED_TEXT)
        if standing.get("refused") == UNKNOWN:  # until this client is connected again
            self._raise_if_disconnected()
            self._again_at = time.monotonic() + _AGAIN_S
            return
        if "refused" in standing:
            raise self._error(standing["refused"], standing.get("why", ""))
        if standing.get("is_open"):
            self._n_unknown = 0
            self._note(standing)
            return
        # It may have ended just now, with its end on the way.
        self._n_unknown += 1
        if self._n_unknown >= _MAX_UNKNOWN and self._again_at is None:
            self._n_unknown = 0
            self._take_end(MOVED, "the gate has forgotten it")

    def _take_broken(self, error: BaseException) -> None:
        """A request has failed, mostly for lack of a connection."""
        if isinstance(error, (OSError, CancelledError, asyncio.CancelledError)):
            self._raise_if_disconnected()
            is_connected = self.client.status == "running"
            self._n_broken = self._n_broken + 1 if is_connected else 0
            if self._n_broken <= _MAX_BROKEN:
                return  # later looks tell
        raise AskError(f"The question could not be asked: {error!r:.200}") from error

    def _error(self, end: str, why: str) -> PCMError:
        name = self._ref.name
        match end:
            case "refused" if end == REFUSED:
                return PromptError(why)
            case "too large" if end == TOO_LARGE:
                return DeviceMemoryError(why)
            case "not loaded" if end == NOT_LOADED:
                return _load_error(why or f"Context {name!r} cannot be loaded.")
            case "not installed" if end == NOT_INSTALLED:
                return InstallError(NOT_INSTALLED_TEXT)
            case "duplicate" if end == DUPLICATE:
                return AskError(f"The question {self.id} is open already.")
            case "foreign" if end == FOREIGN:
                return AskError(f"The question {self.id} is another client's.")
        assert end == FAILED, end
        return AskError(f"The question to {name!r} has failed: {why}")

    def _note(self, standing: Message) -> None:
        """Say what the question waits for."""
        now = time.monotonic()
        if standing["worker"]:
            self.note = ""
            return
        n_workers = standing["n_workers"]
        self._n_most = max(self._n_most, n_workers)
        if n_workers:
            self._had_workers_at = now
            seconds = standing["warm_in_s"]
            about = f": about {span(seconds)}" if seconds and seconds >= 0.5 else ""
            does = "loading" if standing["is_loading"] else "waiting for room to load"
            self.note = f"{does} {self._ref.name!r} on a worker{about}"
            if seconds == 0:
                self.note = "waiting for a worker that is busy, paused, about to end or makes room"
            return
        lack = lack_of_workers(self.client, standing["n_on_cluster"], self._n_most)
        self.note = lack
        if now - self._had_workers_at > _LACK_S and not self._has_lacked:
            self._has_lacked = True
            logger.warning("The question to %r waits: %s.", self._ref.name, lack)

    # -- what is sent ---------------------------------------------------------------------------

    def _look(self) -> None:
        """Nothing has arrived for a while."""
        now = time.monotonic()
        if self._timeout_s is not None and now >= self._begun_at + self._timeout_s:
            waited = f"; it waits: {self.note}" if self.note else ""
            raise TimeoutError(
                f"The question to {self._ref.name!r} has no answer after {self._timeout_s:g} s"
                f" ({len(self.tokens)} tokens){waited}."
            )
        self._raise_if_disconnected()
        if self._again_at is not None:
            if now >= self._again_at:
                self._ask()
        elif now >= self._looked_at + _LOOK_S:
            self._looked_at = now
            self._call("pcm_asked", self._putting(), id=self.id, client=self.client.id)

    def _raise_if_disconnected(self) -> None:
        if self.client.status in ("closed", "closing"):  # else it connects again
            raise AskError(
                f"The client {self.client.id} is {self.client.status}: the question is lost with"
                f" its connection to the scheduler at {self._address}. Make another client and ask"
                " again."
            )
        if self.client.status == "connecting":
            self.note = f"waiting for the scheduler at {self._address}: the connection is lost"

    def _ask_again(self) -> None:
        """Ask again in a moment; messages of the attempt that has ended are dropped."""
        n_again = self._n_moved or self._n_lost
        wait_s = min(_LONGEST_S, _AGAIN_S * 2.0 ** (n_again - 1))
        self._again_at = time.monotonic() + wait_s
        self._attempt += 1

    def _ask(self) -> None:
        if self._again_at is None:
            self._attempt += 1
        self._again_at = None
        self._number = 0
        self._looked_at = time.monotonic()
        asked = replace(self._question, draft=tuple(self.tokens), n_chars=len(self.text))
        about = {"id": self.id, "attempt": self._attempt, "client": self.client.id}
        avoided = sorted(self._avoided)
        packed = {"ref": pickle.dumps(self._ref), "question": pickle.dumps(asked)}
        self._call("pcm_ask", self._putting(), **about, **packed, avoided=avoided)

    def _call(self, op: str, put: Callable[[Any], None], **says: Any) -> None:
        """Call a handler of the scheduler; its answer, or what it raised, is put."""

        client = self.client  # not self: a request must not keep a dropped stream

        async def call() -> Any:
            if client.scheduler is None:
                raise OSError("the client is closed")
            return await getattr(client.scheduler, op)(**says)

        send_soon(client, call(), put)

    def _putting(self) -> Callable[[Any], None]:
        """Puts the gate's answer to a request of the current attempt."""
        inbox, attempt = self.inbox, self._attempt
        return lambda standing: inbox.put({"attempt": attempt, "standing": standing})


def _load_error(why: str) -> LoadError:
    """What went wrong on a worker, without its traceback, which is the cause of the error."""
    first, *rest = why.strip().splitlines()
    if not rest:
        return LoadError(first)
    # What follows the last line of a traceback; messages may have several lines, also indented.
    is_frame = [line.startswith("  ") for line in rest]
    begin = len(rest) - is_frame[::-1].index(True) if True in is_frame else len(rest) - 1
    said = " ".join(line.strip() for line in rest[begin:] if line.strip())
    error = LoadError(f"{first} {said}")
    error.__cause__ = LoadError(why)
    return error


def send_soon(client: Client, call: Coroutine[Any, Any, Any], put: Callable[[Any], None]) -> None:
    """Run a coroutine on a client's loop; give its result, or what it raised, to `put`."""

    def done(future: Future[Any]) -> None:
        try:
            found = future.result()
        except BaseException as error:
            found = error
        put(found)

    try:
        future = asyncio.run_coroutine_threadsafe(call, client.loop.asyncio_loop)
    except RuntimeError:
        call.close()
        raise
    future.add_done_callback(done)
