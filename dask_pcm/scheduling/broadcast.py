"""Broadcast planner: many workers stage the same files in about the time that one takes.

Files are split into chunks that spread as in a BitTorrent swarm: rarest first, each from the least
busy worker that holds it. A chunk that no worker holds is read from the store by one worker. The
store is thus read about once in all, and workers serve chunks before they hold the whole file.

Rarest first: B. Cohen, "Incentives Build Robustness in BitTorrent" (2003). One central planner
sees everything here, so no incentives are needed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Source name of the shared store, next to the addresses of workers.
STORE = "store"
#: Blobs whose holders are remembered.
_MAX_KNOWN = 4_000


@dataclass(frozen=True, slots=True)
class Copy:
    """Have `worker` copy a chunk of a blob from `source`: a worker, or ``STORE``."""

    worker: str
    blob: str
    chunk: int
    source: str


@dataclass(slots=True)
class _Swarm:
    """State of one blob: who holds and who wants which chunk."""

    n_chunks: int
    #: Workers that hold each chunk.
    holders: list[set[str]]
    #: Chunks that each interested worker lacks, without those being copied.
    missing: dict[str, set[int]] = field(default_factory=dict)
    #: Chunks being read from the store, and since when, in seconds.
    from_store: dict[int, float] = field(default_factory=dict)

    def hold(self, worker: str, chunk: int) -> None:
        """A worker holds a chunk, so it lacks it no longer."""
        self.holders[chunk].add(worker)
        missing = self.missing.get(worker)
        if missing is not None:
            missing.discard(chunk)


@dataclass(slots=True)
class _BackOffs:
    """Sources that have failed, and until when each is left alone."""

    first_s: float
    n_failures: Counter[str] = field(default_factory=Counter)
    until: dict[str, float] = field(default_factory=dict)

    def fail(self, source: str, now: float) -> None:
        """A copy from a source has failed: it backs off, each time for twice as long."""
        # Up to 64 times the first: a source that is back is to be found out within minutes.
        self.until[source] = now + self.first_s * 2 ** min(self.n_failures[source], 6)
        self.n_failures[source] += 1

    def forget(self, source: str) -> None:
        """A source works, or has left."""
        self.n_failures.pop(source, None)
        self.until.pop(source, None)

    def is_over(self, source: str, now: float) -> bool:
        """Whether copies may be made from a source."""
        return self.until.get(source, 0.0) <= now


class Broadcast:
    """Plans copies. Pure: the caller reports what happened and carries out ``plan``.

    Parameters
    ----------
    n_from_each
        Concurrent copies from one source, at most.
    n_ahead
        Concurrent copies by one worker, at most.
    back_off_s
        Seconds before a source is used again after a failed copy. Each further failure doubles
        it; a successful copy resets it.
    hangs_s
        Seconds after which an unfinished read from the store is taken to hang, and ignored.
    """

    def __init__(
        self,
        n_from_each: int = 3,
        n_ahead: int = 2,
        back_off_s: float = 15.0,
        hangs_s: float = 60.0,
    ) -> None:
        self._n_from_each = n_from_each
        self._n_ahead = n_ahead
        self._hangs_s = hangs_s
        self._swarms: dict[str, _Swarm] = {}
        self.under_way: set[Copy] = set()
        self._n_out: Counter[str] = Counter()
        self._n_in: Counter[str] = Counter()
        self._back_offs = _BackOffs(back_off_s)

    # -- events ---------------------------------------------------------------------------------

    def want(self, worker: str, blob: str, n_chunks: int, have: Iterable[int] = ()) -> None:
        """A worker wants a blob of `n_chunks` chunks, and holds those in `have`."""
        swarm = self._swarm(blob, n_chunks)
        swarm.missing[worker] = set(range(n_chunks))
        for chunk in have:
            swarm.hold(worker, chunk)

    def has(self, worker: str, blob: str, n_chunks: int) -> None:
        """A worker holds all chunks of a blob."""
        swarm = self._swarm(blob, n_chunks)
        for chunk in range(n_chunks):
            swarm.hold(worker, chunk)
        swarm.missing.pop(worker, None)

    def copied(self, copy: Copy) -> None:
        """A copy has succeeded."""
        if not self._end(copy):
            return
        self._back_offs.forget(copy.source)
        self._swarms[copy.blob].hold(copy.worker, copy.chunk)

    def failed(self, copy: Copy, now: float, is_absent: bool = False) -> None:
        """A copy has failed, so its source backs off.

        A source that merely lacks the chunk (`is_absent`) does not: it only stops being a holder.
        """
        if not self._end(copy):
            return
        swarm = self._swarms[copy.blob]
        swarm.missing.setdefault(copy.worker, set()).add(copy.chunk)
        if is_absent:
            swarm.holders[copy.chunk].discard(copy.source)
            return
        self._back_offs.fail(copy.source, now)

    def drop(self, worker: str, blob: str) -> None:
        """A worker no longer wants a blob, or no longer holds it."""
        swarm = self._swarms.get(blob)
        if swarm is None:
            return
        for copy in [
            c for c in self.under_way if c.blob == blob and worker in (c.worker, c.source)
        ]:
            self._end(copy)
            if copy.source == worker and copy.worker in swarm.missing:
                swarm.missing[copy.worker].add(copy.chunk)
        swarm.missing.pop(worker, None)
        for holders in swarm.holders:
            holders.discard(worker)
        if not swarm.missing and not any(swarm.holders):
            del self._swarms[blob]

    def remove_worker(self, worker: str) -> None:
        """A worker has left."""
        for blob in list(self._swarms):
            self.drop(worker, blob)
        self._back_offs.forget(worker)
        for by_worker in (self._n_out, self._n_in):
            by_worker.pop(worker, None)

    # -- planning -------------------------------------------------------------------------------

    def plan(self, now: float) -> list[Copy]:
        """Return the copies to begin now; they count as in flight."""
        copies: list[Copy] = []
        while True:
            begun = [copy for w in self._idle() if (copy := self._next(w, now)) is not None]
            if not begun:
                return copies
            copies += begun

    def _idle(self) -> list[str]:
        """Workers that may begin another copy, those with the fewest in flight first."""
        workers = {worker for swarm in self._swarms.values() for worker in swarm.missing}
        idle = [worker for worker in workers if self._n_in[worker] < self._n_ahead]
        return sorted(idle, key=lambda worker: (self._n_in[worker], worker))

    def _next(self, worker: str, now: float) -> Copy | None:
        """Begin a worker's next copy: the rarest chunk that some source can serve."""
        if self._n_in[worker] >= self._n_ahead:
            return None
        best: tuple[tuple[int, int, int], Copy] | None = None
        for blob, swarm in self._swarms.items():
            for chunk in swarm.missing.get(worker, ()):
                source = self._source(swarm, chunk, worker, now)
                if source is None:
                    continue
                # Among equally rare chunks each worker starts at another offset. Otherwise all
                # would copy the same chunk and have nothing to exchange.
                turn = (chunk - _hash(worker, swarm.n_chunks)) % swarm.n_chunks
                rank = (len(swarm.holders[chunk]), self._n_out[source], turn)
                if best is None or rank < best[0]:
                    best = rank, Copy(worker, blob, chunk, source)
        if best is None:
            return None
        self._begin(best[1], now)
        return best[1]

    def _source(self, swarm: _Swarm, chunk: int, worker: str, now: float) -> str | None:
        """The least busy source of a chunk; None if all are busy and waiting is better."""
        others = swarm.holders[chunk] - {worker}
        available = [holder for holder in others if self._back_offs.is_over(holder, now)]
        if not available:  # no worker holds the chunk, or all holders back off
            # The limit applies per blob. A read that hangs stops counting after `hangs_s`, so it
            # can delay other reads no longer than that.
            begun = [at for at in swarm.from_store.values() if now - at < self._hangs_s]
            is_read = now - swarm.from_store.get(chunk, float("-inf")) < self._hangs_s
            return STORE if len(begun) < self._n_from_each and not is_read else None
        free = [holder for holder in available if self._n_out[holder] < self._n_from_each]
        return min(free, key=lambda holder: (self._n_out[holder], holder), default=None)

    # -- state ----------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise AssertionError if the counts of copies in flight disagree with the copies."""
        assert Counter(copy.source for copy in self.under_way) == +self._n_out
        assert Counter(copy.worker for copy in self.under_way) == +self._n_in
        # A swarm that is forgotten must have no copy in flight: its end would find no swarm.
        assert {copy.blob for copy in self.under_way} <= self._swarms.keys()

    def _swarm(self, blob: str, n_chunks: int) -> _Swarm:
        if blob not in self._swarms:
            if len(self._swarms) >= _MAX_KNOWN:  # forget the oldest that no worker wants
                for old in [b for b, s in self._swarms.items() if not s.missing][: _MAX_KNOWN // 2]:
                    del self._swarms[old]
            self._swarms[blob] = _Swarm(n_chunks, [set() for _ in range(n_chunks)])
        return self._swarms[blob]

    def _begin(self, copy: Copy, now: float) -> None:
        swarm = self._swarms[copy.blob]
        self.under_way.add(copy)
        self._n_out[copy.source] += 1
        self._n_in[copy.worker] += 1
        swarm.missing[copy.worker].discard(copy.chunk)
        if copy.source == STORE:
            swarm.from_store[copy.chunk] = now

    def _end(self, copy: Copy) -> bool:
        """End a copy; return whether it was in flight. Late and repeated reports change nothing."""
        if copy not in self.under_way:
            return False
        self.under_way.discard(copy)
        self._n_out[copy.source] -= 1
        self._n_in[copy.worker] -= 1
        if copy.source == STORE:
            self._swarms[copy.blob].from_store.pop(copy.chunk, None)
        return True


def _hash(text: str, n: int) -> int:
    """A number below `n` that is the same in every process, unlike ``hash``."""
    return zlib.crc32(text.encode()) % max(1, n)
