"""How files come to workers."""

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
#: A file that comes in chunks from many takes so much longer than over a link of one's own: forty
#: hosts at once, played with the planner of ``scheduling/broadcast.py``, had it after 1.28 times
#: as long in the middle, the last after 1.29 (``benchmarks/ladder.py --only forty``).
_SWARM = 1.3


class Staging(Protocol):
    def fetch(self, worker: str, file: str, n_bytes: int, done: Callable[[], object]) -> None:
        """Bring a file to a worker, and say when it is there; not a word if the worker leaves."""

    def left(self, worker: str) -> None:
        """A worker is gone, with all that it had."""


class FromStore:
    """Everybody reads everything from the shared store, which shares its bandwidth fairly."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def fetch(self, worker: str, file: str, n_bytes: int, done: Callable[[], object]) -> None:
        self._links.send(STORE, worker, n_bytes, done)

    def left(self, worker: str) -> None:
        self._links.close(worker)


@dataclass(frozen=True, slots=True, eq=False)
class _Want:
    worker: str
    file: str
    n_bytes: int
    done: Callable[[], object]


class FromPeers:
    """As TaskVine does it: the manager sends one file after another, and then workers to workers.

    Who needs a file gets it from any worker that has all of it and serves less than its cap; if
    there is none, from the manager, once that is free; and waits meanwhile. A copy goes as fast as
    the links of both ends let it, which others share. What a source was sending when it left
    begins anew.
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
        self._waiting[file].append(_Want(worker, file, n_bytes, done))
        self._serve()

    def left(self, worker: str) -> None:
        for holders in self._holders.values():
            if worker in holders:
                holders.remove(worker)
        for file, wants in self._waiting.items():
            self._waiting[file] = deque(want for want in wants if want.worker != worker)
        for copy in self._links.close(worker):
            want = self._copies.pop(copy)
            self._waiting[want.file].append(want)
        self._copies = {c: want for c, want in self._copies.items() if want.worker != worker}
        self._serve()

    def _serve(self) -> None:
        """Begin every copy that can begin."""
        for file, wants in self._waiting.items():
            while wants and (source := self._source(file)) is not None:
                want = wants.popleft()
                self._send(source, want)

    def _send(self, source: str, want: _Want) -> None:
        most_bytes_s = math.inf
        if source != _MANAGER and self._random.random() < self._settings.slow_share:
            most_bytes_s = self._settings.slow_bytes_s
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
    """As our planner does it: chunks from whoever has them, each read from the store about once.

    Modelled by its effect: a worker has a file after what its own link takes for it, and a little
    longer; one file after another. Nobody has a file before the store has sent all of it once.
    """

    def __init__(self, clock: Clock, links: Links) -> None:
        self._clock = clock
        self._links = links
        self._busy_until: dict[str, float] = {}
        self._sent_at: dict[str, float] = {}
        self._members: dict[str, set[str]] = defaultdict(set)

    def fetch(self, worker: str, file: str, n_bytes: int, done: Callable[[], object]) -> None:
        now = self._clock.now
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
        self._links.close(worker)
        self._busy_until.pop(worker, None)
        for members in self._members.values():
            members.discard(worker)
