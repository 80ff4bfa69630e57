"""The number or share of failed rows at which a run ends."""

from __future__ import annotations

from dataclasses import dataclass

from dask_pcm.errors import LimitError

#: A share of fewer rows is not checked: it says little of the rest.
SHARE_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class FailureLimit:
    """A number of rows, or a share of the rows done.

    >>> FailureLimit.of(20).allows(20, 100), FailureLimit.of("1%").allows(12, 1_100)
    (True, False)
    >>> FailureLimit.of(0.5).allows(9, 10)
    True
    """

    number: int | None = None
    share: float | None = None

    @classmethod
    def of(cls, value: float | str | FailureLimit | None) -> FailureLimit:
        """From a number of rows (20, "20") or a share of them (0.01, "1%"); None allows all.

        Raises
        ------
        LimitError
            The value is neither.
        """
        if value is None:
            return cls()
        if isinstance(value, FailureLimit):
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
    def _of_share(cls, share: float) -> FailureLimit:
        if not 0 <= share <= 1:
            raise ValueError
        return cls(share=share)

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.number:,}"
        return "any" if self.share is None else f"{self.share:.6g}"

    def allows(self, n_failed: int, n_done: int, is_all: bool = False) -> bool:
        """Whether `n_failed` of `n_done` rows may fail.

        A share is checked from ``SHARE_ROWS`` rows on, or if all rows are done (`is_all`).
        """
        if self.number is not None:
            return n_failed <= self.number
        is_early = n_done < SHARE_ROWS and not is_all
        return self.share is None or is_early or n_failed <= self.share * n_done

    def allows_all(self, n_rows: int) -> bool:
        """Whether the user allows every row to fail."""
        return self.share == 1 or (self.number is not None and self.number >= n_rows)
