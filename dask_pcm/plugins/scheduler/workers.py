"""What the gate keeps of workers, runs and recipes, besides what the policy decides by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from distributed.scheduler import WorkerState

from dask_pcm.context.context import ContextRef


@dataclass(slots=True)
class Member:
    """A worker whose plugin has said hello."""

    epoch: str
    cores: tuple[int, ...]
    ws: WorkerState

    @property
    def host(self) -> str:
        return self.ws.host


@dataclass(slots=True)
class Loads:
    """Loads of one context, cluster-wide, since the gate started."""

    n: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class RunInfo:
    client: str
    contexts: tuple[str, ...] = field(default_factory=tuple)


class Refs:
    """Recipes of the contexts that tasks or runs ask for, kept for as long as any does."""

    def __init__(self) -> None:
        self._refs: dict[str, ContextRef] = {}
        self._n_asking: Counter[str] = Counter()

    def __getitem__(self, digest: str) -> ContextRef:
        return self._refs[digest]

    def get(self, digest: str) -> ContextRef | None:
        return self._refs.get(digest)

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, digest: object) -> bool:
        return digest in self._refs

    def add(self, refs: Iterable[ContextRef]) -> tuple[str, ...]:
        """One more asks for `refs`; return their digests."""
        for ref in refs:
            self._refs[ref.digest] = ref
            self._n_asking[ref.digest] += 1
        return tuple(ref.digest for ref in refs)

    def discard(self, digests: Iterable[str]) -> None:
        """One fewer asks for them."""
        for digest in digests:
            self._n_asking[digest] -= 1
            if not self._n_asking[digest]:
                del self._n_asking[digest], self._refs[digest]
