"""Failed loads: per context, per node and per worker, with back-off and quarantine times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dask_pcm.scheduling.events import ResidencyReported

#: Error kind of a load whose worker process ended meanwhile.
END_OF_PROCESS = "end of process"
#: Error kind of a device that cannot be used, for any context.
DEVICE = "device"
#: First and longest back-off or quarantine, in seconds; each repetition doubles it.
_FIRST_S, _LONGEST_S = 10.0, 1_800.0
#: A worker that loads for this share of its time limit, and ends, had no time for it. It may have
#: been told to end at the half of it.
_MOST = 0.4


@dataclass(slots=True)
class QuarantinedNode:
    """A node that gets no work until a given time.

    Attributes
    ----------
    until
        End of the quarantine, in seconds of the policy's clock.
    error
        The error that caused it.
    """

    until: float
    error: str


@dataclass(frozen=True, slots=True)
class Outlasted:
    """A worker that came to the limit of its time while it loaded a context.

    Attributes
    ----------
    limit_s, loaded_s
        How long it had to live, and for how much of that it loaded.
    """

    pool: str
    limit_s: float
    loaded_s: float


@dataclass(slots=True)
class Failures:
    """Failed loads that no later success has cleared.

    Attributes
    ----------
    errors
        Last error of each context.
    of_context
        (host, error kind) of each failure of a context since it last loaded anywhere.
    of_host
        (context, error kind, error) of each failure on a node since anything loaded there. Only
        failures that incriminate the node; see ``record_failure``.
    quarantined
        Nodes in quarantine.
    n_quarantines
        Consecutive quarantines of each node.
    retry_at
        End of each back-off, by (worker, context).
    n_back_offs
        Consecutive back-offs, by (worker, context).
    of_device
        Errors of workers whose device could not be used, by (worker, context).
    outlasted
        Workers whose life was too short to load a context, since it last loaded anywhere.
    given_up
        Contexts that are not loaded again until they are requested anew.
    """

    errors: dict[str, str] = field(default_factory=dict)
    of_context: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    of_host: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    quarantined: dict[str, QuarantinedNode] = field(default_factory=dict)
    n_quarantines: dict[str, int] = field(default_factory=dict)
    retry_at: dict[tuple[str, str], float] = field(default_factory=dict)
    n_back_offs: dict[tuple[str, str], int] = field(default_factory=dict)
    of_device: dict[tuple[str, str], str] = field(default_factory=dict)
    outlasted: dict[str, list[Outlasted]] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)

    def clear(self) -> None:
        """Forget all failures, after all workers were restarted."""
        for by_name in (
            self.errors,
            self.of_context,
            self.of_host,
            self.quarantined,
            self.n_quarantines,
            self.outlasted,
        ):
            by_name.clear()
        for by_pair in (self.retry_at, self.n_back_offs, self.of_device):
            by_pair.clear()
        self.given_up.clear()

    def record_failure(
        self, worker: str, host: str, report: ResidencyReported, has_loaded: bool, now: float
    ) -> None:
        """Record a failed load, and let the worker back off before it tries the context again.

        Parameters
        ----------
        has_loaded
            Whether the context has loaded anywhere. If so, the failure incriminates the node.
        """
        context, kind = report.context, report.kind
        error = report.error or "no reason was given"
        self.errors[context] = error
        if kind != DEVICE:  # an unusable device says nothing of the context
            self.of_context.setdefault(context, []).append((host, kind))
        if kind == DEVICE or has_loaded:
            self.of_host.setdefault(host, []).append((context, kind, error))
        if kind == DEVICE:
            self.of_device[worker, context] = error
        n_back_offs = self.n_back_offs.get((worker, context), 0)
        self.retry_at[worker, context] = now + _wait_s(n_back_offs)
        self.n_back_offs[worker, context] = n_back_offs + 1

    def end_back_offs(self, now: float) -> list[tuple[str, str]]:
        """End the back-offs that are over; return their (worker, context)."""
        over = [pair for pair, until in self.retry_at.items() if until <= now]
        for pair in over:
            del self.retry_at[pair]
        return over

    def remove_worker(self, worker: str) -> None:
        """Forget the back-offs of a worker that has left."""
        self._forget(lambda pair: pair[0] == worker)

    def _forget(self, is_over: Callable[[tuple[str, str]], bool]) -> None:
        for by_pair in (self.retry_at, self.n_back_offs, self.of_device):
            for pair in [pair for pair in by_pair if is_over(pair)]:
                del by_pair[pair]

    def record_load(self, worker: str, host: str, context: str) -> None:
        """Clear the failures that a successful load refutes: of its context, node and worker."""
        self._forget((worker, context).__eq__)
        self.of_context.pop(context, None)
        self.outlasted.pop(context, None)
        self.of_host.pop(host, None)
        self.quarantined.pop(host, None)
        self.n_quarantines.pop(host, None)

    def record_process_end(self, host: str, context: str, name: str) -> None:
        """Record that a worker process ended by itself while it loaded a context."""
        self.errors[context] = (
            f"The worker process ended while it loaded context {name!r}: it ran out of memory, or"
            " native code crashed. See the worker's log."
        )
        self.of_context.setdefault(context, []).append((host, END_OF_PROCESS))

    def record_end_of_time(self, context: str, pool: str, limit_s: float, loaded_s: float) -> None:
        """Record that a worker has ended while it loaded a context.

        It says something of the context if it loaded for most of the time that it had.
        """
        if loaded_s >= _MOST * limit_s:
            self.outlasted.setdefault(context, []).append(Outlasted(pool, limit_s, loaded_s))

    def next_quarantine_s(self, host: str) -> float:
        """Seconds of a node's next quarantine."""
        return _wait_s(self.n_quarantines.get(host, 0))

    def quarantine(self, host: str, until: float, error: str) -> None:
        """Quarantine a node."""
        self.quarantined[host] = QuarantinedNode(until, error)
        self.n_quarantines[host] = self.n_quarantines.get(host, 0) + 1
        self.of_host.pop(host, None)

    def end_quarantines(self, now: float) -> list[str]:
        """End the quarantines that are over; return their nodes."""
        over = [host for host, node in self.quarantined.items() if node.until <= now]
        for host in over:
            del self.quarantined[host]
        return over

    def forgive(self, contexts: Iterable[str]) -> set[str]:
        """Allow new attempts at those of `contexts` that were given up; return these.

        Ends all quarantines too: a request made anew may find the nodes repaired.
        """
        forgiven = self.given_up.intersection(contexts)
        for context in forgiven:
            self.given_up.discard(context)
            self.of_context.pop(context, None)
            self.outlasted.pop(context, None)
        self._forget(lambda pair: pair[1] in forgiven)
        if forgiven:
            self.quarantined.clear()
            self.n_quarantines.clear()
        return forgiven


def _wait_s(n_times: int) -> float:
    """Seconds to wait after `n_times` earlier waits: exponential, with an upper limit."""
    return min(_LONGEST_S, _FIRST_S * 2.0 ** min(n_times, 10))
