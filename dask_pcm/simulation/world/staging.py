"""Staging models: from the shared store, from peers as in TaskVine, or as a swarm."""

from __future__ import annotations

import functools
import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dask_pcm.simulation.scenario.scenario import Baselines
from dask_pcm.simulation.world.clock import Clock
from dask_pcm.simulation.world.links import Links, Transfer

STORE, _MANAGER = "store", "manager"
#: Slowdown of a swarm download over a dedicated link. Forty hosts at once, simulated with the
#: planner of ``scheduling/broadcast.py``, took 1.28 times as long in the median and 1.29 times at
#: most (``benchmarks/ladder.py --only forty``).
_SWARM = 1.3


class StagingPolicy(Protocol):
    """How files reach workers."""

    def fetch(self, worker: str, file: str, n_bytes: int, done: Callable[[], object]) -> None:
        """Stage a file on a worker; call `done` when it arrives, never if the worker leaves."""

    def left(self, worker: str) -> None:
        """A worker has left, and its files are lost."""


class FromStore:
    """Every worker reads from the shared store, which divides its bandwidth equally."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def fetch(self, worker: str, file: str, n_bytes: int, done: Callable[[], object]) -> None:
        """Read the file anew, even if other workers of the same host have it."""
        self._links.send(STORE, worker, n_bytes, done)

    def left(self, worker: str) -> None:
        """The worker's reads stop, and leave their share to the others."""
        self._links.close(worker)


@dataclass(frozen=True, slots=True, eq=False)
class _Want:
    """A request for a file."""

    worker: str
    file: str
    n_bytes: int
    done: Callable[[], object]


class FromPeers:
    """Peer transfers as in TaskVine.

    A file comes from any worker that holds all of it and serves fewer copies than its limit. If
    there is none, it comes from the manager, which sends one file at a time; requests queue
    meanwhile. Copies share the links of both ends. If a source leaves, its copies restart.
    """

    def __init__(self, links: Links, settings: Baselines, seed: int) -> None:
        self._links = links
        self._settings = settings
        links.open(_MANAGER, settings.manager_bytes_s)
        self._random = np.random.default_rng([seed, 1 << 20])
        self._holders: dict[str, list[str]] = defaultdict(list)
        self._waiting: dict[str, deque[_Want]] = defaultdict(deque)
        self._copies: dict[Transfer, _Want] = {}

    def fetch(self, worker: str, file: str, n_bytes: int, done: Callable[[], object]) -> None:
        """Queue the request; requests for one file are served in order."""
        self._waiting[file].append(_Want(worker, file, n_bytes, done))
        self._serve()

    def left(self, worker: str) -> None:
        """Its own requests end; copies from it begin again from another source."""
        for holders in self._holders.values():
            if worker in holders:
                holders.remove(worker)
        for file, wants in self._waiting.items():
            self._waiting[file] = deque(want for want in wants if want.worker != worker)
        for copy in self._links.close(worker):
            # At the tail: others have waited longer, and nothing of a copy is kept.
            want = self._copies.pop(copy)
            self._waiting[want.file].append(want)
        self._copies = {c: want for c, want in self._copies.items() if want.worker != worker}
        self._serve()

    def _serve(self) -> None:
        """Begin every copy for which there is a source."""
        for file, wants in self._waiting.items():
            while wants and (source := self._source(file)) is not None:
                want = wants.popleft()
                self._send(source, want)

    def _send(self, source: str, want: _Want) -> None:
        most_bytes_s = math.inf
        # Drawn per copy, not per worker: any transfer may be slow, from any worker.
        if source != _MANAGER and self._random.random() < self._settings.slow_share:
            most_bytes_s = self._settings.slow_bytes_s
        # The callback names the copy, which exists only once it was sent.
        copy = self._links.send(source, want.worker, want.n_bytes, lambda: None, most_bytes_s)
        copy.done = functools.partial(self._arrive, copy)
        self._copies[copy] = want

    def _source(self, file: str) -> str | None:
        free = [
            h for h in self._holders[file] if self._links.n_sends(h) < self._settings.n_from_each
        ]
        if free:
            return free[int(self._random.integers(len(free)))]
        return None if self._links.n_sends(_MANAGER) else _MANAGER

    def _arrive(self, copy: Transfer) -> None:
        want = self._copies.pop(copy)
        self._holders[want.file].append(want.worker)
        want.done()
        self._serve()


class Swarm:
    """Our broadcast planner, modelled by its effect.

    A worker receives one file after another, each ``_SWARM`` times slower than over a dedicated
    link, and never before the store has sent the whole file once.
    """

    def __init__(self, clock: Clock, links: Links) -> None:
        self._clock = clock
        self._links = links
        self._busy_until: dict[str, float] = {}
        self._sent_at: dict[str, float] = {}
        self._members: dict[str, set[str]] = defaultdict(set)

    def fetch(self, worker: str, file: str, n_bytes: int, done: Callable[[], object]) -> None:
        """Receive the file after those that the worker has asked for before."""
        now = self._clock.now
        # Once all that held it have left, the store has to send it again.
        if not self._members[file]:
            self._sent_at[file] = now + n_bytes / self._links.bandwidth(STORE)
        self._members[file].add(worker)
        begins_s = max(now, self._busy_until.get(worker, now))
        ends_s = max(
            begins_s + _SWARM * n_bytes / self._links.bandwidth(worker), self._sent_at[file]
        )
        self._busy_until[worker] = ends_s
        self._clock.at(ends_s, lambda: done() if worker in self._members[file] else None)

    def left(self, worker: str) -> None:
        """The others go on: a swarm does not depend on one member."""
        self._links.close(worker)
        self._busy_until.pop(worker, None)
        for members in self._members.values():
            members.discard(worker)
