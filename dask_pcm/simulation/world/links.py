"""Bytes on shared links."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dask_pcm.simulation.world.clock import Clock, Timer

#: Copies of a busy source are timed anew when their number has changed by this share.
_SLACK = 0.02


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes on their way."""

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
    bytes_s: float
    #: In the order in which they began; values mean nothing.
    sends: dict[Transfer, None]
    receives: dict[Transfer, None]
    n_shared: int = 0  # by how many its sends were last shared


class Links:
    """Nodes with a link each, as wide one way as the other.

    A transfer goes at the smaller of two equal shares: of its source's link among what that sends,
    and of its target's among what that receives. What one share leaves unused is not given to
    others, so nothing is faster here than under max-min fairness.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._nodes: dict[str, _Node] = {}

    def open(self, node: str, bytes_s: float) -> None:
        self._nodes[node] = _Node(bytes_s, {}, {})

    def close(self, node: str) -> list[Transfer]:
        """A node is gone; what it was sending is returned."""
        gone = self._nodes[node]
        stopped = list(gone.sends)
        for transfer in [*stopped, *gone.receives]:
            self.stop(transfer)
        del self._nodes[node]
        return stopped

    def bandwidth(self, node: str) -> float:
        """Bytes a second of a node's link."""
        return self._nodes[node].bytes_s

    def n_sends(self, node: str) -> int:
        return len(self._nodes[node].sends)

    def send(
        self,
        source: str,
        target: str,
        n_bytes: float,
        done: Callable[[], object],
        most_bytes_s: float = math.inf,
    ) -> Transfer:
        """Begin to send; never faster than `most_bytes_s`."""
        now = self._clock.now
        transfer = Transfer(source, target, n_bytes, done, most_bytes_s, since_s=now)
        self._nodes[source].sends[transfer] = None
        self._nodes[target].receives[transfer] = None
        self._share(transfer)
        return transfer

    def stop(self, transfer: Transfer) -> None:
        """A transfer ends, whole or not."""
        if transfer.timer is not None:
            transfer.timer.call_off()
        self._nodes[transfer.source].sends.pop(transfer, None)
        self._nodes[transfer.target].receives.pop(transfer, None)
        self._share(transfer)

    def _share(self, changed: Transfer) -> None:
        """A transfer began or ended: time those anew that share a link with it."""
        source, target = self._nodes[changed.source], self._nodes[changed.target]
        affected = dict(target.receives)
        if abs(len(source.sends) - source.n_shared) > _SLACK * source.n_shared:
            source.n_shared = len(source.sends)
            affected.update(source.sends)
        for transfer in affected:
            self._time(transfer)

    def _time(self, transfer: Transfer) -> None:
        now = self._clock.now
        source, target = self._nodes[transfer.source], self._nodes[transfer.target]
        bytes_s = min(
            source.bytes_s / len(source.sends),
            target.bytes_s / len(target.receives),
            transfer.most_bytes_s,
        )
        if transfer.timer is not None:
            if math.isclose(bytes_s, transfer.bytes_s):
                return
            transfer.timer.call_off()
        transfer.left_bytes -= transfer.bytes_s * (now - transfer.since_s)
        transfer.bytes_s, transfer.since_s = bytes_s, now
        seconds = max(0.0, transfer.left_bytes) / bytes_s
        transfer.timer = self._clock.after(seconds, lambda: self._arrive(transfer))

    def _arrive(self, transfer: Transfer) -> None:
        self.stop(transfer)
        transfer.done()
