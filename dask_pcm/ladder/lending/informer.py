"""Whether a worker lends: by how many of its own requests wait, with hysteresis.

After the informers of Vijaya Kumar, Antichi and Singh, "Aqua: Network-Accelerated Memory Offloading
for LLMs in Scale-Up GPU Domains" (ASPLOS 2025): memory is offered when few requests wait and
asked back when many do. The role is the worker's, whichever contexts it has.
"""

from __future__ import annotations

#: Requests that wait: memory is asked back from as many on, and offered again with as few for as
#: long, in seconds.
_MANY, _FEW, _QUIET_S = 10, 2, 2.0


class Informer:
    """Decides whether a worker offers what it can spare.

    Examples
    --------
    >>> informer = Informer()
    >>> [informer.decide(n_waiting, now) for n_waiting, now in [(0, 0), (9, 1), (10, 2), (3, 3)]]
    [True, True, False, False]
    >>> [informer.decide(2, now) for now in (4, 5, 6)]  # quiet for two seconds
    [False, False, True]
    """

    def __init__(self) -> None:
        self.is_offering = True
        #: Since when few requests wait; None while more do.
        self._quiet_since: float | None = None

    def decide(self, n_waiting: int, now: float) -> bool:
        """Whether to offer memory.

        Parameters
        ----------
        n_waiting
            Requests of the worker that wait for memory.
        now
            In seconds.
        """
        if n_waiting > _FEW:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        if n_waiting >= _MANY:
            self.is_offering = False
        elif self._quiet_since is not None and now >= self._quiet_since + _QUIET_S:
            self.is_offering = True
        return self.is_offering
