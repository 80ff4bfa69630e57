"""Fairness between clients: the client that has been served least goes first.

Start-time fair queueing (Goyal, Vin & Cheng, SIGCOMM 1996), with worker-seconds as service. Each
client's virtual time advances by the service it gets. A client that becomes active starts at the
smallest virtual time of the active clients, so idle time earns no credit.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Shares:
    """Service of each client, in worker-seconds."""

    served_s: dict[str, float] = field(default_factory=dict)
    #: Waiting pieces of work of each client.
    n_waiting: dict[str, int] = field(default_factory=dict)

    def add_work(self, client: str) -> None:
        """A piece of the client's work has begun to wait."""
        n_waiting = self.n_waiting.get(client, 0)
        if not n_waiting:
            least_s = min((self.served_s[other] for other in self.n_waiting), default=None)
            if least_s is None:  # no other client waits, so earlier service does not matter
                self.served_s = {client: self.served_s.get(client, 0.0)}
            else:
                self.served_s[client] = max(self.served_s.get(client, 0.0), least_s)
        self.n_waiting[client] = n_waiting + 1

    def remove_work(self, client: str) -> None:
        """A piece of the client's work no longer waits."""
        self.n_waiting[client] -= 1
        if not self.n_waiting[client]:
            del self.n_waiting[client]

    def charge(self, client: str, seconds: float) -> None:
        """Charge a client for `seconds` of a worker."""
        self.served_s[client] = self.served_s.get(client, 0.0) + seconds

    def get_served_s(self, client: str) -> float:
        """Worker-seconds of service that count against a client."""
        return self.served_s.get(client, 0.0)
