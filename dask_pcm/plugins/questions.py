"""Words that clients, the gate and workers use of questions."""

from __future__ import annotations

#: How an answer ends: complete, to be asked again elsewhere, or by an error.
DONE, MOVED, REFUSED, FAILED = "done", "moved", "refused", "failed"
#: How the gate ends a question: its worker was lost, its context cannot be loaded, fits nowhere.
LOST, NOT_LOADED, TOO_LARGE = "lost", "not loaded", "too large"
#: Why the gate refuses a request: another client's question, one that is open, no toolkit, a client
#: that is not connected.
FOREIGN, DUPLICATE, NOT_INSTALLED, UNKNOWN = "foreign", "duplicate", "not installed", "unknown"


def topic_of(client: str) -> str:
    """The topic of a client, on which it gets all of its answers."""
    return f"pcm-ask-{client}"
