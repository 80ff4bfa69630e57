"""How many rows are computed between two records of a journal."""

from __future__ import annotations

from dask_pcm.ledger.suspects import Suspects

#: Batches that take less are recorded several at a time.
_RECORD_S = 0.02


class Pace:
    """Grows the rows of a record until writing it costs little beside computing it.

    Suspects come alone, however fast they are.

    Attributes
    ----------
    batch_s
        What the last batch took with its wait for the contexts, in seconds; 0 before the first.
    """

    def __init__(self, batch_rows: int, suspects: Suspects) -> None:
        self.suspects = suspects
        self.batch_s = 0.0
        self._batch_rows = self._n_rows = batch_rows

    def end(self, start: int) -> int:
        """The end of the next batch, at the latest, where it begins with row `start`."""
        return self.suspects.end(start, self._n_rows, self._batch_rows)

    def observe(self, start: int, seconds: float) -> None:
        """The batch from row `start` took `seconds` seconds."""
        self.batch_s = seconds
        if seconds < _RECORD_S and not self.suspects.include(start):
            self._n_rows *= 2
