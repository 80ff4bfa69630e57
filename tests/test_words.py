"""Plain technical English: words that messages, docstrings, comments and docs do not use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Archaisms and pictures, and what the field says instead.
REFUSED = {
    "whoever": "the process, user or worker that",
    "whomever": "the process, user or worker that",
    "somebody": "a user, a process",
    "nobody": "say who or what does not",
    "whatever": "any, regardless of",
    "nobody's": "say what it is",
    "takes its leave": "shuts down",
    "take its leave": "shut down",
    "stand in": "be in, replace",
    "stands in": "is in, replaces",
    "by halves": "by bisection",
    "in hand": "in flight",
    "so many": "a number",
    "the rung below": "the next tier",
    "goes down a rung": "is offloaded",
    "lies in each other": "overlap",
}
WORDS = re.compile(rf"\b({'|'.join(REFUSED)})\b", re.IGNORECASE)


def texts():
    for folder, *patterns in (
        ("dask_pcm", "*.py", "*.yaml"),
        ("docs", "*.md"),
        ("benchmarks", "*.py", "*.md"),
        ("jobqueue-configs", "*.yaml"),
        ("notebooks", "*.ipynb"),
    ):
        for pattern in patterns:
            yield from (ROOT / folder).rglob(pattern)
    yield from ROOT.glob("*.md")


@pytest.mark.parametrize("path", list(texts()), ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_use_the_words_of_the_field(path):
    found = [
        f"{number}: {match[0]!r}: {REFUSED[match[0].lower()]}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in WORDS.finditer(line)
    ]
    assert not found, "\n".join(found)
