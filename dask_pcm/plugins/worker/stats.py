"""What one task has done: times, facts of its contexts, and how its functions failed.

A tally tells a function that fails on every row from one that fails on bad rows. It keeps the first
exception, with its traceback and the row that caused it. If the exception ends a run, the user sees
it as if the function had raised it there.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cloudpickle
from tblib import pickling_support  # type: ignore[import-untyped] # its types are not shipped

from dask_pcm.errors import UserFunctionError
from dask_pcm.scheduling.rules.first_batches import Failing

if TYPE_CHECKING:  # so that a worker without such work does not import pandas
    import pandas as pd

_MAX_VALUE_CHARS, _MAX_ROW_CHARS = 200, 1_000
_MAX_BYTES = 200_000


class Tally:
    """Counts the batches and the failures of one function in one task; for the task's thread."""

    def __init__(self) -> None:
        self._n_batches = 0
        self._has_succeeded = False
        #: Types by name: a class that is defined in the function is a new object in each call.
        self._kinds: set[str] = set()
        #: The first exception, packed: an unpacked traceback would keep the live object alive.
        self.error = b""

    def begin_batch(self) -> None:
        """Count a batch."""
        self._n_batches += 1

    def succeed(self) -> None:
        """Note that a row succeeded, or failed without a call of the function."""
        self._has_succeeded = True

    def fail(self, row: pd.DataFrame, error: Exception) -> None:
        """Note that the function raised `error` on a single row."""
        self._kinds.add(f"{type(error).__module__}.{type(error).__qualname__}")
        if not self.error:
            error.add_note(f"Every row so far raised this; one of them: {_text_of(row)}")
            self.error = pack(error)

    @property
    def failing(self) -> Failing | None:
        """How the function fails, if every row so far raised the same type; otherwise None."""
        if self._has_succeeded or len(self._kinds) > 1:
            return None
        return Failing(self._n_batches, "".join(self._kinds))


@dataclass(slots=True)
class TaskStats:
    """Collected along one task and passed on with its result; for the task's thread.

    Attributes
    ----------
    waited_s, held_s
        Seconds for which it waited for contexts, and held them.
    facts
        The contents of the live objects' ``facts`` mappings: device, dtype.
    tallies
        Failures of the row-wise functions, by the functions' digests.
    """

    waited_s: float = 0.0
    held_s: float = 0.0
    facts: dict[str, str] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def note_facts(self, values: Iterable[Any]) -> None:
        """Add the facts of live objects."""
        for value in values:
            if isinstance(facts := getattr(value, "facts", None), Mapping):
                self.facts.update(facts)

    def failing(self) -> tuple[Failing | None, bytes]:
        """How a function failed on all rows, and its packed exception.

        None if no function did; 0 batches if none ran.
        """
        for tally in self.tallies.values():
            if (failing := tally.failing) is not None:
                return failing, tally.error
        return None if self.tallies else Failing(0), b""


def pack(error: Exception) -> bytes:
    """Pickle an exception with its traceback, or its text if that is impossible or too large."""
    try:
        pickling_support.install(error)
        packed = cloudpickle.dumps(error)
        if len(packed) <= _MAX_BYTES:
            f"{pickle.loads(packed)!s} {error!r}"  # Dask calls both: they must not raise later
            return bytes(packed)
    except Exception:  # for instance a class whose constructor takes other arguments than `args`
        pass
    told = "".join(traceback.format_exception(error))[-_MAX_BYTES // 2 :]
    return pickle.dumps(UserFunctionError(f"The function raised on every row:\n{told}"))


def unpack(packed: bytes) -> Exception:
    """Return the exception that ``pack`` has pickled."""
    error: Exception = pickle.loads(packed)
    return error


def _text_of(row: pd.DataFrame) -> str:
    """A frame of one row as text, shortened."""
    values = {name: _short(row[name].iloc[0]) for name in row.columns}
    pairs = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"index {_short(row.index[0])}: {pairs}"[:_MAX_ROW_CHARS]


def _short(value: Any) -> str:
    """A value as text, shortened; never raises."""
    try:
        is_scalar = getattr(value, "ndim", None) == 0  # numpy's repr would name the type
        text = repr(value.item() if is_scalar else value)
    except Exception as broken:
        text = f"(no text: {type(broken).__name__})"
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"
