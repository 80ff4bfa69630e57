"""Messages of a chat become a prompt by the template of the model's folder, on the worker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dask_pcm.errors import PromptError

#: A role and a content.
Message: TypeAlias = Mapping[str, str]
_KEYS = ("role", "content")


def checked_prompt(prompt: Any) -> str | tuple[Message, ...]:
    """A text, or the messages of a chat; PromptError for anything else."""
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("The question is empty.")
        return _checked_text(prompt, "The question")
    if isinstance(prompt, (Mapping, bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise PromptError(f"A question is a text or a list of messages; found {prompt!r:.80}.")
    if not prompt:
        raise PromptError("The chat has no message.")
    return tuple(_checked(message, number) for number, message in enumerate(prompt))


def _checked(message: Any, number: int) -> dict[str, str]:
    example = '{"role": "user", "content": "…"}'
    if not isinstance(message, Mapping):
        raise PromptError(f"Message {number} is {message!r:.80}; expected a dict: {example}.")
    for key in _KEYS:
        if not isinstance(message.get(key), str):
            what = f"has no {key!r}" if key not in message else f"has {key} {message[key]!r:.80}"
            raise PromptError(f"Message {number} {what}; expected texts: {example}.")
    if unknown := [key for key in message if key not in _KEYS]:
        raise PromptError(f"Message {number} has {unknown[0]!r:.80}; expected {example}.")
    return {key: _checked_text(str(message[key]), f"Message {number}") for key in _KEYS}


def _checked_text(text: str, what: str) -> str:
    """A text that can be encoded; PromptError otherwise."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} has half of a character ({text[error.start]!r}) at {error.start}: it was"
            " decoded with another encoding, or cut within a character."
        ) from None
    return text


def has_chat_template(folder: str | Path) -> bool:
    """Whether a model folder has a chat template that is used by default."""
    path = Path(folder)
    if (path / "chat_template.jinja").is_file():
        return True
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        try:
            found = json.loads((path / name).read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, list):  # several, by name
            found = any(isinstance(one, dict) and one.get("name") == "default" for one in found)
        if found:
            return True
    return False


def rendered(tokenizer: Any, prompt: str | Sequence[Message], is_chat: bool | None) -> str:
    """The prompt of a question, for the tokenizer of its model.

    Raises
    ------
    PromptError
        There is no template, or it refuses the messages.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str):
        if is_chat is False or (is_chat is None and not has_template):
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if not has_template:
        raise no_template("The model")
    try:
        text = tokenizer.apply_chat_template(
            [dict(one) for one in prompt], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program; jinja2 has a type for each kind
        raise PromptError(f"The chat template of the model refuses the messages: {error}") from None
    return str(text)


def no_template(model: str) -> PromptError:
    """The error for messages to a model that has no chat template."""
    return PromptError(
        f"{model} has no chat template, so it takes no messages. Ask it with a text, which is its"
        " whole prompt."
    )
