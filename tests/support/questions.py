"""Questions that need no model: the live object is a list of texts, each of which is a piece."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from dask_pcm.plugins.questions import DONE
from dask_pcm.plugins.worker.questions import News


class Live:
    """What a context loads; answers go on as far as a test has said."""

    def __init__(self) -> None:
        self.n_cancelled = 0
        self.answers: list[Script] = []


@dataclass(frozen=True)
class Asked:
    """A question that is answered by what the test says; `error` is raised instead."""

    error: Exception | None = None
    text: str = ""

    def begin(self, served: Live, wake: Any, apart: Any) -> Script:
        if self.error is not None:
            raise self.error
        answer = Script(served, wake)
        served.answers.append(answer)
        if self.text:
            answer.say(self.text, is_last=True)
        return answer


class Script:
    """An answer, for any thread."""

    def __init__(self, live: Live, wake: Any) -> None:
        self._live = live
        self._wake = wake
        self._lock = threading.Lock()
        self._text = ""
        self._is_last = False
        self.error: Exception | None = None
        #: Whether it cannot be interrupted: a test calls `then` once it has ended.
        self.is_slow = False
        self.then: Any = None

    def say(self, text: str, is_last: bool = False) -> None:
        with self._lock:
            self._text += text
            self._is_last = is_last
        self._wake()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._wake()

    def take(self) -> News:
        if self.error is not None:
            raise self.error
        with self._lock:
            text, self._text = self._text, ""
            end = {"end": DONE, "n_tokens": 1, "finish_reason": "stop"} if self._is_last else None
        return News([*map(ord, text)], text, end)

    def cancel(self, then: Any) -> None:
        self._live.n_cancelled += 1
        if self.is_slow:
            self.then = then
        else:
            then()
