"""What arrives for questions of this process: events of a client's topic, and answers of RPCs."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

from distributed import Client

from dask_pcm.plugins.questions import topic_of

Message: TypeAlias = dict[str, Any]


class Inbox:
    """Messages for one question, in order; put by any thread, got by one thread or coroutine."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], object] | None = None

    def put(self, message: Message) -> None:
        """Add a message; it is told when it came."""
        message["at"] = time.monotonic()
        with self._changed:
            self._messages.append(message)
            self._changed.notify()
            wake, self._wake = self._wake, None
        if wake is not None:
            with suppress(RuntimeError):  # the loop that waited for it is closed
                wake()

    def get(self, timeout_s: float) -> Message | None:
        """The next message; None if there is none in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages, timeout_s)
            return self._messages.popleft() if self._messages else None

    async def get_async(self, timeout_s: float) -> Message | None:
        """As ``get``, in an event loop, which goes on meanwhile."""
        until = time.monotonic() + timeout_s
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self._changed:
                if self._messages:
                    return self._messages.popleft()
                self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
            try:
                await asyncio.wait_for(arrived.wait(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                return None
            arrived.clear()


class Mailbox:
    """The topic of a client: passes each event on to the inbox of its question.

    Inboxes are not kept alive by it, so a stream that nothing refers to is collected.
    """

    def __init__(self, client: Client) -> None:
        self._inboxes: weakref.WeakValueDictionary[str, Inbox] = weakref.WeakValueDictionary()
        client.subscribe_topic(topic_of(client.id), self._on_event)

    def open(self, id: str, inbox: Inbox) -> None:
        """Pass messages of a question on to an inbox."""
        self._inboxes[id] = inbox

    def close(self, id: str) -> None:
        """Drop messages of a question from now on."""
        self._inboxes.pop(id, None)

    def _on_event(self, event: tuple[float, Message]) -> None:
        _, message = event
        inbox = self._inboxes.get(str(message.get("id")))
        if inbox is not None:
            inbox.put(message)


_mailboxes: weakref.WeakKeyDictionary[Client, Mailbox] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def mailbox_of(client: Client) -> Mailbox:
    """The mailbox of a client, one for all of its questions."""
    with _making:
        found = _mailboxes.get(client)
        if found is None:
            found = _mailboxes[client] = Mailbox(client)
        return found
