"""Fairness between clients: who has been served least goes first.

Start-time fair queueing (Goyal, Vin & Cheng, SIGCOMM 1996), with seconds of workers as the work:
each client's clock goes on by what it is given, and one that comes, or comes back, begins at the
clock of whoever waits and has been served least. So nobody saves up for later, or makes up for
having been away.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Shares:
    """What each client has been given."""

    served_s: dict[str, float] = field(default_factory=dict)
    #: Pieces of work of each that wait.
    n_waiting: dict[str, int] = field(default_factory=dict)

    def arrive(self, client: str) -> None:
        """A piece of its work waits."""
        n_waiting = self.n_waiting.get(client, 0)
        if not n_waiting:
            least_s = min((self.served_s[other] for other in self.n_waiting), default=None)
            if least_s is None:  # nobody else waits: what was is of no account
                self.served_s = {client: self.served_s.get(client, 0.0)}
            else:
                self.served_s[client] = max(self.served_s.get(client, 0.0), least_s)
        self.n_waiting[client] = n_waiting + 1

    def leave(self, client: str) -> None:
        """A piece of its work waits no more."""
        self.n_waiting[client] -= 1
        if not self.n_waiting[client]:
            del self.n_waiting[client]

    def charge(self, client: str, seconds: float) -> None:
        """A worker is given to it for so long."""
        self.served_s[client] = self.served_s.get(client, 0.0) + seconds

    def of(self, client: str) -> float:
        return self.served_s.get(client, 0.0)
