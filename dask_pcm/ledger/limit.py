"""How many rows may fail before a run is not worth going on with."""

from __future__ import annotations

from dataclasses import dataclass

from dask_pcm.errors import LimitError

#: So many rows, and nothing but failures, is no bad luck.
HOPELESS_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Limit:
    """A number of rows, or a share of them all.

    >>> Limit.of(20).allows(20, 100), Limit.of("1%").allows(2, 100), Limit.of(0.5).allows(50, 100)
    (True, False, True)
    """

    number: int | None = None
    share: float | None = None

    @classmethod
    def of(cls, value: float | str | Limit | None) -> Limit:
        """From a number of rows (20, "20") or a share of them (0.01, "1%"); None allows all.

        Raises
        ------
        LimitError
            For anything else.
        """
        if value is None:
            return cls()
        if isinstance(value, Limit):
            return value
        try:
            if isinstance(value, str) and value.endswith("%"):
                return cls._of_share(float(value[:-1]) / 100)
            if isinstance(value, str):
                value = float(value) if "." in value else int(value)
            if isinstance(value, float):
                return cls._of_share(value)
            if isinstance(value, bool) or value < 0:
                raise ValueError
            return cls(number=value)
        except (TypeError, ValueError):
            raise LimitError(
                f"max_failed_rows takes a number of rows or a share of them (0.01, '1%'); found"
                f" {value!r}."
            ) from None

    @classmethod
    def _of_share(cls, share: float) -> Limit:
        if not 0 <= share <= 1:
            raise ValueError
        return cls(share=share)

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.number:,}"
        return "any" if self.share is None else f"{self.share:.6g}"

    def allows(self, n_failed: int, n_rows: int) -> bool:
        """Whether so many of all rows may fail."""
        if self.number is not None:
            return n_failed <= self.number
        return self.share is None or n_failed <= self.share * n_rows

    def is_hopeless(self, n_failed: int, n_done: int) -> bool:
        """Whether there is no reason to think that any row will ever succeed."""
        has_limit = self.number is not None or (self.share is not None and self.share < 1)
        return has_limit and n_failed == n_done >= HOPELESS_ROWS
