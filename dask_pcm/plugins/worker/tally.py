"""What a function by rows has come to, so that one that fails on every row is told from bad rows.

One exception is kept, with its traceback and a row that made it: where it ends a job, it reaches
the user as if the function had raised it there.
"""

from __future__ import annotations

import pickle
import traceback
from typing import TYPE_CHECKING, Any

import cloudpickle
from tblib import pickling_support  # type: ignore[import-untyped] # its types are not shipped

from dask_pcm.errors import UserFunctionError
from dask_pcm.scheduling.rules.first_batches import Failing

if TYPE_CHECKING:  # a worker without such work imports no pandas
    import pandas as pd

_MAX_VALUE_CHARS, _MAX_ROW_CHARS = 200, 1_000
_MAX_BYTES = 200_000


class Tally:
    """The batches of one function in one task, as far as they tell whether all of it fails."""

    def __init__(self) -> None:
        self._n_batches = 0
        self._has_succeeded = False
        #: By name: a class that is defined in the function is another one in each call.
        self._kinds: set[str] = set()
        #: The first exception, packed: its traceback would keep the live object from being freed.
        self.error = b""

    def begin_batch(self) -> None:
        self._n_batches += 1

    def succeed(self) -> None:
        """Some row was answered, or failed without being computed."""
        self._has_succeeded = True

    def fail(self, row: pd.DataFrame, error: Exception) -> None:
        """The function raised `error` on one row alone."""
        self._kinds.add(f"{type(error).__module__}.{type(error).__qualname__}")
        if not self.error:
            error.add_note(f"Every row so far raised this; one of them: {_text_of(row)}")
            self.error = pack(error)

    @property
    def failing(self) -> Failing | None:
        """Its batches, if all of their rows raised one type of exception."""
        if self._has_succeeded or len(self._kinds) > 1:
            return None
        return Failing(self._n_batches, "".join(self._kinds))


def pack(error: Exception) -> bytes:
    """An exception with its traceback; in words where it cannot be pickled."""
    try:
        pickling_support.install(error)
        packed = cloudpickle.dumps(error)
        if len(packed) <= _MAX_BYTES:
            f"{pickle.loads(packed)!s} {error!r}"  # Dask asks for both
            return bytes(packed)
    except Exception:  # classes that cannot be made again from their arguments, and the like
        pass
    told = "".join(traceback.format_exception(error))[-_MAX_BYTES // 2 :]
    return pickle.dumps(UserFunctionError(f"The function raised on every row:\n{told}"))


def unpack(packed: bytes) -> Exception:
    """What ``pack`` has packed."""
    error: Exception = pickle.loads(packed)
    return error


def _text_of(row: pd.DataFrame) -> str:
    values = {name: _short(row[name].iloc[0]) for name in row.columns}
    pairs = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"index {_short(row.index[0])}: {pairs}"[:_MAX_ROW_CHARS]


def _short(value: Any) -> str:
    try:
        is_scalar = getattr(value, "ndim", None) == 0  # of numpy, whose repr names its type
        text = repr(value.item() if is_scalar else value)
    except Exception as broken:
        text = f"(no text: {type(broken).__name__})"
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"
