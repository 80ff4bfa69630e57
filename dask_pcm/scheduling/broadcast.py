"""Who copies which chunk from whom, so that many are staged in about the time that one takes.

Chunks spread as in a swarm: the rarest first, from whoever has them and has least to do; what is
nowhere yet is read from the store, each chunk by one worker. So the store is read about once in
all, and what a worker has of a file it serves on before it has the rest.

B. Cohen: Incentives Build Robustness in BitTorrent (2003), for rarest first; here nobody needs an
incentive, and one planner sees all.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Where files lie, for whoever can read them: a source like a worker.
STORE = "store"
#: Blobs of which it is remembered who has them.
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
    """A blob that workers stage."""

    n_chunks: int
    #: Who has each chunk.
    holders: list[set[str]]
    #: What each worker that wants it lacks, copies under way left out.
    missing: dict[str, set[int]] = field(default_factory=dict)
    #: Chunks that are being read from the store, and since when.
    from_store: dict[int, float] = field(default_factory=dict)


class Broadcast:
    """Plans copies; pure: it is told what happens, and asked what to do.

    Parameters
    ----------
    n_from_each
        Copies from one source at a time.
    n_ahead
        Copies by one worker at a time.
    rest_s
        Seconds for which a source is left alone after a copy from it has failed; each further
        failure doubles it, and a copy that succeeds ends it.
    hangs_s
        Seconds after which a read from the store that has not ended counts for nothing.
    """

    def __init__(
        self,
        n_from_each: int = 3,
        n_ahead: int = 2,
        rest_s: float = 15.0,
        hangs_s: float = 60.0,
    ) -> None:
        self._n_from_each = n_from_each
        self._n_ahead = n_ahead
        self._rest_s = rest_s
        self._hangs_s = hangs_s
        self._swarms: dict[str, _Swarm] = {}
        self.under_way: set[Copy] = set()
        self._n_out: Counter[str] = Counter()
        self._n_in: Counter[str] = Counter()
        self._n_failures: Counter[str] = Counter()
        self._rests_until: dict[str, float] = defaultdict(float)

    # -- what happens ---------------------------------------------------------------------------

    def want(self, worker: str, blob: str, n_chunks: int, have: Iterable[int] = ()) -> None:
        """A worker stages a blob, and has some of its chunks."""
        swarm = self._swarm(blob, n_chunks)
        swarm.missing[worker] = set(range(n_chunks))
        for chunk in have:
            self._hold(swarm, worker, chunk)

    def has(self, worker: str, blob: str, n_chunks: int) -> None:
        """A worker has all of a blob."""
        swarm = self._swarm(blob, n_chunks)
        for chunk in range(n_chunks):
            self._hold(swarm, worker, chunk)
        swarm.missing.pop(worker, None)

    def copied(self, copy: Copy) -> None:
        """A copy has succeeded."""
        if not self._end(copy):
            return
        self._n_failures.pop(copy.source, None)
        self._rests_until.pop(copy.source, None)
        self._hold(self._swarms[copy.blob], copy.worker, copy.chunk)

    def failed(self, copy: Copy, now: float, is_absent: bool = False) -> None:
        """A copy has failed: its source rests. One that only has not got the chunk does not."""
        if not self._end(copy):
            return
        swarm = self._swarms[copy.blob]
        swarm.missing.setdefault(copy.worker, set()).add(copy.chunk)
        if is_absent:
            swarm.holders[copy.chunk].discard(copy.source)
            return
        n_failures = self._n_failures[copy.source]
        self._n_failures[copy.source] += 1
        self._rests_until[copy.source] = now + self._rest_s * 2 ** min(n_failures, 6)

    def drop(self, worker: str, blob: str) -> None:
        """A worker wants a blob no more, or has it no more."""
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

    def leave(self, worker: str) -> None:
        """A worker is gone."""
        for blob in list(self._swarms):
            self.drop(worker, blob)
        for books in (self._n_failures, self._rests_until, self._n_out, self._n_in):
            books.pop(worker, None)

    # -- what to do -----------------------------------------------------------------------------

    def plan(self, now: float) -> list[Copy]:
        """Copies to begin now; they count as under way."""
        copies: list[Copy] = []
        while True:
            begun = [copy for w in self._idle() if (copy := self._next(w, now)) is not None]
            if not begun:
                return copies
            copies += begun

    def _idle(self) -> list[str]:
        """Workers that may copy more; those that have least to do and least of it first."""
        workers = {worker for swarm in self._swarms.values() for worker in swarm.missing}
        idle = [worker for worker in workers if self._n_in[worker] < self._n_ahead]
        return sorted(idle, key=lambda worker: (self._n_in[worker], worker))

    def _next(self, worker: str, now: float) -> Copy | None:
        """The next copy of a worker: the rarest chunk that somebody can give."""
        if self._n_in[worker] >= self._n_ahead:
            return None
        best: tuple[tuple[int, int, int], Copy] | None = None
        for blob, swarm in self._swarms.items():
            for chunk in swarm.missing.get(worker, ()):
                source = self._source(swarm, chunk, worker, now)
                if source is None:
                    continue
                # Among chunks as rare as each other, each worker begins elsewhere.
                turn = (chunk - _hash(worker, swarm.n_chunks)) % swarm.n_chunks
                rank = (len(swarm.holders[chunk]), self._n_out[source], turn)
                if best is None or rank < best[0]:
                    best = rank, Copy(worker, blob, chunk, source)
        if best is None:
            return None
        self._begin(best[1], now)
        return best[1]

    def _source(self, swarm: _Swarm, chunk: int, worker: str, now: float) -> str | None:
        awake = [h for h in swarm.holders[chunk] if h != worker and self._is_awake(h, now)]
        if not awake:  # nowhere yet, or nobody who has it can be reached
            # Each blob has its store; what hangs there holds up nobody for long.
            begun = [at for at in swarm.from_store.values() if now - at < self._hangs_s]
            is_read = now - swarm.from_store.get(chunk, float("-inf")) < self._hangs_s
            return STORE if len(begun) < self._n_from_each and not is_read else None
        free = [holder for holder in awake if self._n_out[holder] < self._n_from_each]
        return min(free, key=lambda holder: (self._n_out[holder], holder), default=None)

    def _is_awake(self, source: str, now: float) -> bool:
        return self._rests_until.get(source, 0.0) <= now

    # -- books ----------------------------------------------------------------------------------

    def _swarm(self, blob: str, n_chunks: int) -> _Swarm:
        if blob not in self._swarms:
            if len(self._swarms) >= _MAX_KNOWN:  # those that nobody asks for may go
                for old in [b for b, s in self._swarms.items() if not s.missing][: _MAX_KNOWN // 2]:
                    del self._swarms[old]
            self._swarms[blob] = _Swarm(n_chunks, [set() for _ in range(n_chunks)])
        return self._swarms[blob]

    def _hold(self, swarm: _Swarm, worker: str, chunk: int) -> None:
        swarm.holders[chunk].add(worker)
        missing = swarm.missing.get(worker)
        if missing is not None:
            missing.discard(chunk)

    def _begin(self, copy: Copy, now: float) -> None:
        swarm = self._swarms[copy.blob]
        self.under_way.add(copy)
        self._n_out[copy.source] += 1
        self._n_in[copy.worker] += 1
        swarm.missing[copy.worker].discard(copy.chunk)
        if copy.source == STORE:
            swarm.from_store[copy.chunk] = now

    def _end(self, copy: Copy) -> bool:
        if copy not in self.under_way:
            return False
        self.under_way.discard(copy)
        self._n_out[copy.source] -= 1
        self._n_in[copy.worker] -= 1
        if copy.source == STORE:
            self._swarms[copy.blob].from_store.pop(copy.chunk, None)
        return True


def _hash(text: str, n: int) -> int:
    """A number below `n`, the same in every process."""
    return zlib.crc32(text.encode()) % max(1, n)
