"""The number or share of failed rows at which a run ends."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

from dask_pcm.errors import LimitError

#: A share of fewer rows is not checked: it says little of the rest.
SHARE_ROWS = 1_000


def is_whole_number(value: object) -> bool:
    """Whether a value is a whole number from 0 on, of Python or NumPy."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    return is_whole and int(value) >= 0  # type: ignore[call-overload] # is_whole says so


def _is_share(value: object) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and 0 <= float(value) <= 1  # type: ignore[arg-type] # is_number says so


@dataclass(frozen=True, slots=True)
class FailureLimit:
    """At most this many failed rows, or this share of the rows done; None for any.

    >>> FailureLimit(rows=20).allows(20, 100), FailureLimit(share=0.01).allows(12, 1_100)
    (True, False)
    >>> FailureLimit(share=0.5).allows(9, 10)
    True

    Raises
    ------
    LimitError
        `rows` is no whole number from 0 on, or `share` no number between 0 and 1.
    """

    rows: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        rows, share = self.rows, self.share
        if rows is not None and not is_whole_number(rows):
            hint = " For a share of the rows, use max_failed_share=."
            is_share = isinstance(rows, (float, str))
            raise LimitError(
                f"max_failed_rows takes a number of rows, such as 20; found {rows!r}."
                f"{hint if is_share else ''}"
            )
        if share is not None and not _is_share(share):
            hint = " For a number of rows, use max_failed_rows=." if is_whole_number(share) else ""
            raise LimitError(
                f"max_failed_share takes a share of the rows from 0 to 1, such as 0.01; found"
                f" {share!r}.{hint}"
            )

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"max_failed_rows={self.rows:,}"
        share = "" if self.share is None else f"max_failed_share={self.share:.6g}"
        return " or ".join(filter(None, [rows, share]))

    def allows(self, n_failed: int, n_done: int, is_all: bool = False) -> bool:
        """Whether `n_failed` of `n_done` rows may fail.

        A share is checked from ``SHARE_ROWS`` rows on, or if all rows are done (`is_all`).
        """
        if self.rows is not None and n_failed > self.rows:
            return False
        is_early = n_done < SHARE_ROWS and not is_all
        return self.share is None or is_early or n_failed <= self.share * n_done

    def allows_all(self, n_rows: int) -> bool:
        """Whether the user has said that every row may fail."""
        is_said = self.rows is not None or self.share is not None
        return is_said and self.allows(n_rows, n_rows, is_all=True)
