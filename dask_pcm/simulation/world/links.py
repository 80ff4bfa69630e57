"""Transfers share the links of their source and target equally."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dask_pcm.simulation.world.clock import Clock, Timer

#: Relative change in the number of a source's transfers at which they are timed anew. An exact
#: update at every change would cost quadratic time for a busy source.
_SLACK = 0.02


@dataclass(slots=True, eq=False)
class Transfer:
    """A transfer in flight."""

    source: str
    target: str
    left_bytes: float
    done: Callable[[], object]
    most_bytes_s: float = math.inf
    bytes_s: float = 0.0
    since_s: float = 0.0
    timer: Timer | None = None


@dataclass(slots=True)
class _Node:
    """A node and its transfers; the dicts serve as ordered sets."""

    bytes_s: float
    sends: dict[Transfer, None]
    receives: dict[Transfer, None]
    n_shared: int = 0  # number of sends when these were last timed


class Links:
    """Nodes with one symmetric link each.

    A transfer runs at the smaller of two equal shares: of its source's link among that node's
    sends, and of its target's link among that node's receives. Unused bandwidth of a share is not
    redistributed, so no transfer is faster than under max-min fairness.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._nodes: dict[str, _Node] = {}

    def open(self, node: str, bytes_s: float) -> None:
        """Add a node whose link carries `bytes_s` bytes per second in each direction."""
        self._nodes[node] = _Node(bytes_s, {}, {})

    def close(self, node: str) -> list[Transfer]:
        """Remove a node and stop its transfers; return those that it was sending."""
        gone = self._nodes[node]
        stopped = list(gone.sends)
        for transfer in [*stopped, *gone.receives]:
            self.stop(transfer)
        del self._nodes[node]
        return stopped

    def bandwidth(self, node: str) -> float:
        """Bandwidth of a node's link, in bytes per second."""
        return self._nodes[node].bytes_s

    def n_sends(self, node: str) -> int:
        """Number of transfers that a node is sending."""
        return len(self._nodes[node].sends)

    def send(
        self,
        source: str,
        target: str,
        n_bytes: float,
        done: Callable[[], object],
        most_bytes_s: float = math.inf,
    ) -> Transfer:
        """Begin a transfer, at most at `most_bytes_s` bytes per second; call `done` at its end."""
        now = self._clock.now
        transfer = Transfer(source, target, n_bytes, done, most_bytes_s, since_s=now)
        self._nodes[source].sends[transfer] = None
        self._nodes[target].receives[transfer] = None
        self._share(transfer)
        return transfer

    def stop(self, transfer: Transfer) -> None:
        """End a transfer, complete or not."""
        if transfer.timer is not None:
            transfer.timer.cancel()
        self._nodes[transfer.source].sends.pop(transfer, None)
        self._nodes[transfer.target].receives.pop(transfer, None)
        self._share(transfer)

    def _share(self, changed: Transfer) -> None:
        """After a transfer began or ended, time anew the transfers that share a link with it."""
        source, target = self._nodes[changed.source], self._nodes[changed.target]
        affected = dict(target.receives)
        if abs(len(source.sends) - source.n_shared) > _SLACK * source.n_shared:
            source.n_shared = len(source.sends)
            affected.update(source.sends)
        for transfer in affected:
            self._time(transfer)

    def _time(self, transfer: Transfer) -> None:
        """Set a transfer's rate from the current shares, and its timer from the bytes left."""
        now = self._clock.now
        source, target = self._nodes[transfer.source], self._nodes[transfer.target]
        bytes_s = min(
            source.bytes_s / len(source.sends),
            target.bytes_s / len(target.receives),
            transfer.most_bytes_s,
        )
        if transfer.timer is not None:
            # The same rate gives the same end; a timer less to cancel and to set.
            if math.isclose(bytes_s, transfer.bytes_s):
                return
            transfer.timer.cancel()
        transfer.left_bytes -= transfer.bytes_s * (now - transfer.since_s)
        transfer.bytes_s, transfer.since_s = bytes_s, now
        # Rounding may have sent a few bytes too many.
        seconds = max(0.0, transfer.left_bytes) / bytes_s
        transfer.timer = self._clock.after(seconds, lambda: self._arrive(transfer))

    def _arrive(self, transfer: Transfer) -> None:
        self.stop(transfer)  # first: what `done` begins gets its share of the link
        transfer.done()
