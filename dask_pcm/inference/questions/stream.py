"""The answer to a question, piece by piece, in plain loops and in asynchronous ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dask.utils import parse_timedelta
from distributed import Client

from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import AskError, InstallError, PromptError
from dask_pcm.inference.calls.generate import Generate
from dask_pcm.inference.options import checked_generation
from dask_pcm.inference.questions.chat import checked_prompt, has_chat_template, no_template
from dask_pcm.inference.questions.exchange import Exchange
from dask_pcm.inference.questions.question import Question, template
from dask_pcm.inference.questions.reply import Reply
from dask_pcm.inference.questions.shown import Shown, shown

#: What to write where waiting would block the event loop of an asynchronous client.
IN_LOOP = "The client is asynchronous. Write async for piece in llm.stream(...)."


class Stream:
    """Pieces of an answer: ``for piece in stream``, or ``async for piece in stream``.

    The question is asked when the stream is made. Leaving a loop early, ``close()``, or dropping
    the stream ends the answer on its worker.
    """

    def __init__(self, exchange: Exchange, progress: Shown) -> None:
        self._exchange = exchange
        self._shown = progress

    @property
    def text(self) -> str:
        """The text so far."""
        return self._exchange.text

    @property
    def reply(self) -> Reply | None:
        """The whole answer; None until it is there."""
        return self._exchange.reply

    def __iter__(self) -> Iterator[str]:
        exchange = self._exchange
        if exchange.client.asynchronous:  # which waits for the loop that this would block
            raise InstallError(IN_LOOP)
        self._raise_if_closed()
        try:
            with self._shown:
                while exchange.is_open:
                    piece = exchange.take(exchange.inbox.get(exchange.patience_s))
                    self._shown.show(exchange.text, exchange.note)
                    if piece:
                        yield piece
        finally:
            exchange.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        exchange = self._exchange
        self._raise_if_closed()
        try:
            with self._shown:
                while exchange.is_open:
                    message = await exchange.inbox.get_async(exchange.patience_s)
                    piece = exchange.take(message)
                    self._shown.show(exchange.text, exchange.note)
                    if piece:
                        yield piece
        finally:
            exchange.close()

    def close(self) -> None:
        """End the answer, unless it is there."""
        self._exchange.close()

    def _raise_if_closed(self) -> None:
        if not self._exchange.is_open and self._exchange.reply is None:
            raise AskError("The stream is closed, and its answer is not complete: ask again.")

    def __reduce__(self) -> NoReturn:
        raise TypeError("A stream cannot be copied or sent elsewhere: ask again there.")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not if __init__ or the making of its exchange has failed.
        if (exchange := getattr(self, "_exchange", None)) is not None:
            exchange.close()

    def __repr__(self) -> str:
        state = "complete" if self.reply else "open" if self._exchange.is_open else "closed"
        return f"<Stream, {state}: {self.text!r:.60}>"


def open_stream(
    ref: ContextRef,
    prompt: Any,
    *,
    client: Client,
    folder: str | Path | None,
    chat: bool | None,
    timeout: float | str | None,
    shows_text: bool,
    progress: bool,
    **options: Any,
) -> Stream:
    """Ask a question; see ``LLM.stream``.

    Parameters
    ----------
    folder
        The model's folder; None if it is not here, so that its workers tell what is wrong.
    """
    asked = checked_prompt(prompt)
    if not (chat is None or isinstance(chat, bool)):
        raise PromptError(f"chat must be True, False or None; found {chat!r}.")
    if chat is False and not isinstance(asked, str):
        raise PromptError("Messages are a chat: leave chat=False out, or give a text.")
    needs_template = chat or not isinstance(asked, str)
    if needs_template and folder is not None and not has_chat_template(folder):
        raise no_template(repr(ref.name))
    given = checked_generation(**options, n=1)
    call = Generate(
        template=template(),
        truncate_column=None,
        kept=(),
        batch_tokens=Config.read().batch_tokens,
        special_tokens_in_fields=True,  # the user's own text
        **given,
    )
    question = Question(call=call, prompt=asked, is_chat=chat, client=client.id)
    return Stream(Exchange(client, ref, question, _seconds(timeout)), shown(progress, shows_text))


def _seconds(timeout: float | str | None) -> float | None:
    if timeout is None:
        return None
    try:
        seconds = float(parse_timedelta(timeout))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PromptError(
            f"timeout must be seconds, such as 60, or a text, such as '1m'; found {timeout!r}."
        ) from error
    if seconds <= 0:
        raise PromptError(f"timeout is {timeout!r}; expected more than 0.")
    return seconds


def whole(stream: Stream) -> Reply:
    """Wait for the whole answer of a stream."""
    for _ in stream:
        pass
    assert stream.reply is not None  # the loop raises otherwise
    return stream.reply
