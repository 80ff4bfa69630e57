"""What has failed, where and how; which contexts are given up, and which nodes are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

#: How a load fails that ends its process, or whose process is ended meanwhile.
END_OF_PROCESS = "end of process"
#: How a load fails where the device cannot be used, whatever is loaded.
DEVICE = "device"
#: A process that a nanny started again is back within so many seconds.
_BACK_S = 60.0
#: A node is left alone for so long at first, each time for twice as long, and never for longer.
_FIRST_S, _LONGEST_S = 10.0, 1_800.0


@dataclass(slots=True)
class Shunned:
    """A node that is left alone for now."""

    until: float
    error: str


@dataclass(slots=True)
class Failures:
    """Loads that have failed since the same loaded again.

    Attributes
    ----------
    errors
        The last error of each context.
    of_context
        Nodes where each has failed since it last loaded, and how.
    of_host
        What has failed on each node since anything loaded there: (context, how, with what error);
        of nodes that are to be looked at.
    """

    errors: dict[str, str] = field(default_factory=dict)
    of_context: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    of_host: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    shunned: dict[str, Shunned] = field(default_factory=dict)
    #: How often in a row each node has been left alone.
    n_shunned: dict[str, int] = field(default_factory=dict)
    #: Until when each worker is not asked again for a context that failed there, and how often in a
    #: row it has.
    resting: dict[tuple[str, str], float] = field(default_factory=dict)
    n_rested: dict[tuple[str, str], int] = field(default_factory=dict)
    #: What workers whose device could not be used for a context said, since it last loaded there.
    of_device: dict[tuple[str, str], str] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    #: Nodes whose worker ended while it loaded a context, which and when.
    ended_loading: list[tuple[str, str, float]] = field(default_factory=list)

    def clear(self) -> None:
        """All begin anew."""
        for books in (self.errors, self.of_context, self.of_host, self.shunned, self.n_shunned):
            books.clear()
        self.resting.clear()
        self.n_rested.clear()
        self.of_device.clear()
        self.given_up.clear()
        self.ended_loading.clear()

    def add(self, host: str, context: str, kind: str, error: str, has_loaded: bool) -> None:
        """A load has failed; `has_loaded` says whether the same has succeeded anywhere."""
        self.errors[context] = error
        if kind != DEVICE:  # which says nothing of what was loaded
            self.of_context.setdefault(context, []).append((host, kind))
        if kind == DEVICE or has_loaded:
            self.of_host.setdefault(host, []).append((context, kind, error))

    def rest(self, worker: str, context: str, kind: str, now: float) -> None:
        """A worker that has failed to load a context is asked again, but not soon."""
        if kind == DEVICE:
            self.of_device[worker, context] = self.errors[context]
        n_rested = self.n_rested.get((worker, context), 0)
        self.resting[worker, context] = now + _wait_s(n_rested)
        self.n_rested[worker, context] = n_rested + 1

    def rested(self, now: float) -> list[tuple[str, str]]:
        """Workers that may be asked again, and for which context."""
        over = [pair for pair, until in self.resting.items() if until <= now]
        for pair in over:
            del self.resting[pair]
        return over

    def leave(self, worker: str) -> None:
        """A worker is gone."""
        self._forget(lambda pair: pair[0] == worker)

    def _forget(self, is_over: Callable[[tuple[str, str]], bool]) -> None:
        for books in (self.resting, self.n_rested, self.of_device):
            for pair in [pair for pair in books if is_over(pair)]:
                del books[pair]

    def loaded(self, worker: str, host: str, context: str) -> None:
        """A context has been loaded on a node."""
        self._forget((worker, context).__eq__)
        self.of_context.pop(context, None)
        self.of_host.pop(host, None)
        self.shunned.pop(host, None)
        self.n_shunned.pop(host, None)

    def ended(self, host: str, context: str, now: float) -> None:
        """A process has ended while it loaded a context."""
        self.ended_loading.append((host, context, now))

    def blame(self, host: str, names: Mapping[str, str], now: float) -> list[str]:
        """A worker is back on a node where one has just ended while it loaded: that has failed.

        What was lost with its node has not: nobody comes back from there so soon.
        """
        recent = [ended for ended in self.ended_loading if now - ended[2] < _BACK_S]
        self.ended_loading = [ended for ended in recent if ended[0] != host]
        blamed = list(dict.fromkeys(context for at, context, _ in recent if at == host))
        for context in blamed:
            self.errors[context] = (
                f"The worker process ended while it loaded context {names.get(context, context)!r}:"
                " killed for its memory, or by a crash of native code. What the worker logged may"
                " say more."
            )
            self.of_context.setdefault(context, []).append((host, END_OF_PROCESS))
        return blamed

    def next_shun_s(self, host: str) -> float:
        """For how long a node is to be left alone this time."""
        return _wait_s(self.n_shunned.get(host, 0))

    def shun(self, host: str, until: float, error: str) -> None:
        """Leave a node alone."""
        self.shunned[host] = Shunned(until, error)
        self.n_shunned[host] = self.n_shunned.get(host, 0) + 1
        self.of_host.pop(host, None)

    def welcome(self, now: float) -> list[str]:
        """Nodes that have been left alone for long enough: they may be tried again."""
        back = [host for host, shunned in self.shunned.items() if shunned.until <= now]
        for host in back:
            del self.shunned[host]
        return back

    def forgive(self, contexts: Iterable[str]) -> set[str]:
        """Contexts that were given up and are asked for anew; nodes are tried again for them."""
        forgiven = self.given_up.intersection(contexts)
        for context in forgiven:
            self.given_up.discard(context)
            self.of_context.pop(context, None)
        self._forget(lambda pair: pair[1] in forgiven)
        if forgiven:
            self.shunned.clear()
            self.n_shunned.clear()
        return forgiven


def _wait_s(n_times: int) -> float:
    return min(_LONGEST_S, _FIRST_S * 2.0 ** min(n_times, 10))
