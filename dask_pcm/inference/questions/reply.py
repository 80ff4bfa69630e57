"""The answer to a question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a question; ``str(reply)`` is its text.

    Attributes
    ----------
    text
        The text, without the stop string that ended it.
    n_tokens
        Tokens that were generated.
    finish_reason
        "stop" at a stop token or string, "length" at the limit.
    first_s, total_s
        Seconds from the question to the first of the answer, and to its end.
    """

    text: str
    n_tokens: int
    finish_reason: str
    first_s: float = 0.0
    total_s: float = 0.0

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.text
