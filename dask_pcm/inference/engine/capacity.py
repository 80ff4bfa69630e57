"""How many tokens a step has: as many as make it faster, and as there is memory for.

Found by trying, as the rate of tokens depends on the model, the device and the rows. Hill climbing
on steps that are full; a failure halves the way to what did fit, and limits are raised slowly.
"""

from __future__ import annotations

from collections.abc import Callable

#: The next size that is tried; and how much faster it has to be to stay.
_STEP, _GAIN = 1.5, 1.03
#: Full steps of a size, of which the fastest counts: others had to wait for something.
_N_COMPARED = 4
#: Full steps until larger ones are tried again: at first, and at most; twice as many each time.
_N_SETTLED, _MOST_SETTLED = 16, 512
#: How limits change after a failure if as large a step did fit before; and after as many without.
_LOWER, _RAISE, _N_PATIENT = 0.93, 1.05, 200


class Capacity:
    """Tokens of a step.

    Parameters
    ----------
    tokens
        To begin with.
    least, most
        Its range.
    on_settled
        Told a size at which it stays for a while.

    Examples
    --------
    >>> capacity = Capacity(512, most=8192)
    >>> for _ in range(12):
    ...     capacity.observe(capacity.tokens, seconds=1.0)  # twice as many in the same time
    >>> capacity.tokens
    1728
    >>> capacity.fail(1728)  # 1152 did fit
    >>> capacity.tokens
    1440
    """

    def __init__(
        self,
        tokens: int,
        *,
        most: int,
        least: int = 32,
        on_settled: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_settled = on_settled
        self._least, self._most = least, max(most, least)
        self._size = min(max(tokens, least), self._most)
        self._limit = self._most
        #: Tokens of the largest step for which there was memory.
        self._fits = 0
        self._rates: list[float] = []
        #: The size below that is known, with its rate; None while none is compared with.
        self._below: tuple[int, float] | None = None
        self._n_settled, self._n_next = 0, _N_SETTLED
        self._n_since_failure = 0
        self._patience = _N_PATIENT

    @property
    def tokens(self) -> int:
        """Tokens that the next step has at most."""
        return min(self._size, self._limit)

    def observe(self, n_tokens: int, seconds: float) -> None:
        """A full step has taken so long."""
        self._n_since_failure += 1
        self._fits = max(self._fits, n_tokens)
        if self._limit < self._most and self._n_since_failure >= self._patience:
            self._n_since_failure = 0
            self._limit = min(self._most, int(self._limit * _RAISE))
        if self._n_settled:
            self._n_settled -= 1
            return
        self._rates.append(n_tokens / max(seconds, 1e-9))
        if len(self._rates) == _N_COMPARED:
            self._compare(max(self._rates))

    def fail(self, n_tokens: int) -> None:
        """A step of `n_tokens` has found no memory."""
        if n_tokens <= self._fits:  # other rows than those that did fit
            self._fits = int(n_tokens * _LOWER**2)
        between = (n_tokens + self._fits) // 2
        self._limit = max(self._least, min(between, self._limit))
        self._size, self._n_since_failure = self.tokens, 0
        self._patience *= 2
        self._settle()

    def _compare(self, rate: float) -> None:
        if self._below is not None and rate < _GAIN * self._below[1]:
            self._size = self._below[0]
            self._settle()
        elif self.tokens < self._limit:
            self._below = self.tokens, rate
            self._size = min(int(self.tokens * _STEP), self._limit)
            self._rates = []
        else:
            self._settle()

    def _settle(self) -> None:
        """Stay at this size for a while, and try larger ones after that."""
        self._n_settled, self._rates, self._below = self._n_next, [], None
        self._n_next = min(2 * self._n_next, _MOST_SETTLED)
        self._on_settled(self.tokens)
