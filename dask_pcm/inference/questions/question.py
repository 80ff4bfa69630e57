"""A question on its worker: it is rendered, tokenised, and computed among the rows of batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_pcm.errors import PromptError
from dask_pcm.inference.calls.generate import Continuation, Generate
from dask_pcm.inference.engine.rows import Generated, RowError
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.engine.timeslice import Kind, Owner
from dask_pcm.inference.prompts import Template
from dask_pcm.inference.questions.chat import Message, rendered
from dask_pcm.plugins.questions import DONE, FAILED
from dask_pcm.plugins.worker.questions import News

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PaddedModel

#: The field of the template that a question is.
PROMPT = "prompt"
#: What an incomplete character is decoded to.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question; see ``plugins.worker.questions.Question``.

    Attributes
    ----------
    call
        How it is answered.
    prompt
        A text, or the messages of a chat.
    is_chat
        Whether a text is the message of a chat; None if so with a model that has a chat template.
    client
        Who asks.
    draft, n_chars
        Tokens that an earlier attempt has sent, and characters of their text.
    """

    call: Generate
    prompt: str | tuple[Message, ...]
    is_chat: bool | None
    client: str
    draft: tuple[int, ...] = ()
    n_chars: int = 0

    def begin(
        self,
        served: Any,
        wake: Callable[..., None],
        apart: Callable[[Callable[[], Any]], Future[Any]],
    ) -> Streamed:
        """See ``plugins.worker.questions.Question``."""
        live = served.live if isinstance(served, Serving) else served
        model: PaddedModel | None = getattr(live, "padded", None)
        if model is None:
            raise PromptError(f"A {type(live).__name__} answers no questions: it is no LLM.")
        self.call.check_model(model)
        text = rendered(model.tokenizer, self.prompt, self.is_chat)
        (plan,) = self.call.planned(model, [{PROMPT: text}])
        if isinstance(plan, str):
            raise PromptError(plan.replace("The row", "The prompt"))
        if not isinstance(served, Serving):
            so_far = _SoFar(wake, model.stops_of(self.call.stop))
            padded = apart(lambda: self.call.padded(model, [plan], so_far.take)[0])
            padded.add_done_callback(lambda _: wake(True))
            return Streamed(self, model, so_far, padded)
        (row,) = self.call.rows(model, plan)
        assert isinstance(row, Generated)
        row.owner = Owner(Kind.QUESTION, self.client)
        row.resume(self.draft)
        row.on_token = lambda token: wake()
        future = served.ask(row)
        future.add_done_callback(lambda _: wake(True))
        call = self.call
        return Streamed(self, model, row, future, lambda new: call.result(model, plan, new))


class Streamed:
    """An answer that is taken piece by piece; see ``plugins.worker.questions.Answer``.

    Parameters
    ----------
    row
        What has the new tokens, as an engine or padded batches compute them.
    future
        The result: the new tokens of the row, in a list, or what padded batches have found.
    result
        Makes of the first what padded batches find.
    """

    def __init__(
        self,
        question: Question,
        model: PaddedModel,
        row: Generated | _SoFar,
        future: Future[Any],
        result: Callable[[Any], Any] = lambda found: found,
    ) -> None:
        self._model = model
        self._row = row
        self._future = future
        self._result = result
        self._stop = question.call.stop
        self._n_tokens = len(question.draft)
        self._n_chars = question.n_chars
        #: Whether an earlier attempt has sent some; and what this one has.
        self._is_resumed, self._text = bool(question.draft), ""

    def take(self) -> News:
        """See ``Answer``."""
        if self._future.done():
            return self._last(self._result(self._future.result()))
        new = self._row.new
        text = settled(self._model.decode(new), self._stop)
        return self._news(new, text)

    def _last(self, found: Sequence[Continuation] | RowError) -> News:
        if isinstance(found, RowError):
            return News([], "", {"end": FAILED, "why": str(found)})
        (whole,) = found
        end = {"end": DONE, "n_tokens": whole.n_tokens, "finish_reason": whole.finish_reason}
        text = whole.text or ""
        if self._is_resumed or not text.startswith(self._text):
            end["text"] = text  # else it is what was sent
        return self._news(self._row.new, text, end)

    def _news(self, tokens: list[int], text: str, end: dict[str, Any] | None = None) -> News:
        news = News(tokens[self._n_tokens :], text[self._n_chars :], end)
        self._n_tokens = max(self._n_tokens, len(tokens))
        self._n_chars = max(self._n_chars, len(text))
        self._text += news.text
        return news

    def cancel(self, then: Callable[[], None]) -> None:
        """See ``Answer``."""
        self._future.cancel()
        if isinstance(self._row, _SoFar):  # one that computes goes on to its next token
            self._row.is_cancelled = True
        self._future.add_done_callback(lambda _: then())


class _SoFar:
    """The new tokens of a row that padded batches continue, which end with it once cancelled."""

    def __init__(self, wake: Callable[[], None], stops: Collection[int]) -> None:
        self.new: list[int] = []
        self.is_cancelled = False
        self._wake = wake
        self._stops = stops

    def take(self, tokens: Sequence[int]) -> bool:
        """Take the tokens so far; return whether they are enough."""
        if len(tokens) > len(self.new) and tokens[-1] not in self._stops:
            self.new = list(tokens)
            self._wake()
        return self.is_cancelled


def settled(text: str, stops: Sequence[str]) -> str:
    """The beginning of a text that no further token changes, and that no stop string may cut off.

    Examples
    --------
    >>> settled("It is so. En", ["End"]), settled("It is so. End", ["End"])
    ('It is so. ', 'It is so. ')
    >>> settled("caf\\ufffd", [])
    'caf'
    """
    text = text.rstrip(_INCOMPLETE)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if ends:
        return text[: min(ends)]
    n_held = max((_n_begun(text, stop) for stop in stops), default=0)
    return text[: len(text) - n_held]


def _n_begun(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string begins."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def template() -> Template:
    """The template of a question, which is all of its prompt."""
    return Template(f"{{{PROMPT}}}")
