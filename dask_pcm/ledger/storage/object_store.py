"""An fsspec filesystem that raises OutputError if its store does not answer."""

from __future__ import annotations

import functools
from typing import Any

from dask_pcm.errors import OutputError, shown_cause

#: Libraries whose exceptions are about a store or the connection to it.
_CLIENTS = frozenset(
    {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}
)


class ObjectStore:
    """A filesystem whose methods raise OutputError if the store cannot be reached.

    Errors about a file (missing, exists, not permitted) are raised as they are: callers handle
    them.
    """

    def __init__(self, fs: Any, url: str) -> None:
        self._fs = fs
        self._url = url

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        return self._translating(found) if callable(found) else found

    def _translating(self, method: Any) -> Any:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            try:
                return method(*args, **options)
            except Exception as error:
                if not is_of_store(error):
                    raise
                raise OutputError(
                    f"The store of {self._url!r} does not answer: {type(error).__name__}: {error}."
                    " Committed parts stay; rerun the same call to resume."
                ) from shown_cause(error)

        return call


def is_of_store(error: BaseException) -> bool:
    """Whether an error means that a store cannot be reached, and is not about one of its files."""
    return isinstance(error, (ConnectionError, TimeoutError)) or is_of_client(error)


def is_of_client(error: BaseException) -> bool:
    """Whether a store's client library raised an error about the connection to its store.

    Libraries are recognised by the modules of the error's classes, so that none has to be imported.
    Their subclasses of OSError are about files.
    """
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return not isinstance(error, OSError) and not modules.isdisjoint(_CLIENTS)
