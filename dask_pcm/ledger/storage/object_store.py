"""An fsspec filesystem that says in our words that its store does not answer."""

from __future__ import annotations

import functools
from typing import Any

from dask_pcm.errors import OutputError, shown_cause

#: Where libraries come from whose errors tell of a store, or of the way to it.
_CLIENTS = frozenset(
    {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}
)


class Store:
    """A filesystem, whose methods raise OutputError where the store cannot be reached.

    What is said of a file (that it is missing, exists, may not be written) is raised as it is.
    """

    def __init__(self, fs: Any, url: str) -> None:
        self._fs = fs
        self._url = url

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        return self._told(found) if callable(found) else found

    def _told(self, method: Any) -> Any:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            try:
                return method(*args, **options)
            except Exception as error:
                if not is_of_store(error):
                    raise
                raise OutputError(
                    f"The store of {self._url!r} does not answer: {type(error).__name__}: {error}."
                    " What was committed stays; run the same again to go on."
                ) from shown_cause(error)

        return call


def is_of_store(error: BaseException) -> bool:
    """Whether an error tells that a store cannot be reached, not of one of its files."""
    return isinstance(error, (ConnectionError, TimeoutError)) or is_of_client(error)


def is_of_client(error: BaseException) -> bool:
    """Whether an error is one that a store's client library raises of the way to its store."""
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return not isinstance(error, OSError) and not modules.isdisjoint(_CLIENTS)
