"""Warnings of what a digest cannot see, or sees otherwise in every process."""

from __future__ import annotations

import warnings
from typing import Any

from dask_pcm.errors import IdentityWarning


def warn_of_type(value: Any) -> None:
    """Warn that changes of an object are not seen."""
    warnings.warn(
        f"{type(value).__qualname__} object {value!r:.80} can be neither walked nor pickled, so it"
        " counts by its type: a resumed run does not notice that it has changed. Build the object"
        " inside the loader, or give its class a __dask_tokenize__ method that returns its parts.",
        IdentityWarning,
        stacklevel=2,
    )


def warn_of_state(value: Any) -> None:
    """Warn that an object has another identity in every process."""
    warnings.warn(
        f"{type(value).__qualname__} object {value!r:.80} is pickled differently each time, so what"
        " uses it has another identity in every process: such a run cannot be resumed by another"
        " process. Build the object inside the function or the loader, or give its class a"
        " __dask_tokenize__ method that returns its parts.",
        IdentityWarning,
        stacklevel=2,
    )
