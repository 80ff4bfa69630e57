"""The recipes that tasks and runs refer to, and the residency changes that workers report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask_pcm.context.context import ContextRef
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.plugins.scheduler.workers import Workers
from dask_pcm.scheduling.events import ContextDeclared, ResidencyReported
from dask_pcm.tiers import Tier

#: Tiers that a release frees.
_HELD = (Tier.DEVICE, Tier.LOADING, Tier.HOST)


@dataclass(slots=True)
class LoadReports:
    """Number and total seconds of one context's loads on all workers, since the gate started."""

    n: int = 0
    seconds: float = 0.0


class Refs:
    """Reference-counted recipes: kept as long as a task or an open run refers to them."""

    def __init__(self) -> None:
        self._refs: dict[str, ContextRef] = {}
        self._n_asking: Counter[str] = Counter()

    def __getitem__(self, digest: str) -> ContextRef:
        return self._refs[digest]

    def get(self, digest: str) -> ContextRef | None:
        """The ref of a digest; None if nothing refers to it."""
        return self._refs.get(digest)

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, digest: object) -> bool:
        return digest in self._refs

    def add(self, refs: Iterable[ContextRef]) -> tuple[str, ...]:
        """Count one more reference to each of `refs`; return their digests."""
        for ref in refs:
            self._refs[ref.digest] = ref
            self._n_asking[ref.digest] += 1
        return tuple(ref.digest for ref in refs)

    def discard(self, digests: Iterable[str]) -> None:
        """Count one reference less; a recipe without references is dropped."""
        for digest in digests:
            self._n_asking[digest] -= 1
            if not self._n_asking[digest]:
                del self._n_asking[digest], self._refs[digest]


class ContextService(Service):
    """Tells the policy which contexts exist and where they are; releases them on request."""

    def __init__(self, hub: Hub, workers: Workers) -> None:
        self._hub = hub
        self._workers = workers
        self.refs = Refs()
        self.loads: dict[str, LoadReports] = {}
        #: Language models that were declared, also those that nothing refers to any more.
        self.models: dict[str, ContextRef] = {}

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """See ``Service``."""
        return {"pcm_release": self.on_release}

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """See ``Service``."""
        return {"pcm-residency": self.on_residency}

    def declare(self, refs: Sequence[ContextRef]) -> tuple[str, ...]:
        """Add the references of one task or run; return the digests."""
        for ref in refs:
            # Declared memory is not part of the digest: a later client may have corrected it.
            known = self.refs.get(ref.digest)
            if ref.about:
                self.models[ref.digest] = ref
            if known is None or known.device_memory_bytes != ref.device_memory_bytes:
                file_bytes = sum(bundle.n_bytes for bundle in ref.bundles)
                declared = ref.device_memory_bytes, file_bytes
                self._hub.apply(ContextDeclared(ref.digest, ref.name, *declared))
        return self.refs.add(refs)

    def size_of(self, ref: ContextRef) -> int:
        """Bytes that a context takes on a device: measured or declared; 0 while unknown."""
        contexts = self._hub.state.contexts
        if ref.device_memory_bytes is not None and ref.digest not in contexts.measured:
            return ref.device_memory_bytes
        return contexts.size(ref.digest)

    def on_residency(
        self,
        worker: str,
        digest: str,
        tier: str,
        seconds: float,
        error: str | None,
        is_built: bool = False,
        n_bytes: int = 0,
        device_bytes: int | None = None,
        kind: str = "",
        staged_s: float = 0.0,
        n_rows: int = 0,
        **kwargs: Any,
    ) -> None:
        """A worker reports that a context changed its tier, or failed to."""
        reported = ResidencyReported(
            worker,
            digest,
            Tier(tier),
            seconds=seconds,
            error=error,
            is_built=is_built,
            n_bytes=n_bytes,
            device_bytes=device_bytes,
            kind=kind,
            staged_s=staged_s,
            n_rows=n_rows,
        )
        if reported.tier is Tier.DEVICE and is_built:
            loads = self.loads.setdefault(digest, LoadReports())
            loads.n, loads.seconds = loads.n + 1, loads.seconds + seconds
        self._hub.apply(reported)

    async def on_release(self, digests: list[str]) -> int:
        """A client releases contexts; return how many workers held one of them."""
        n_holding = 0
        for address, view in self._hub.state.workers.items():
            n_holding += any(view.tiers.get(digest) in _HELD for digest in digests)
            for digest in digests:
                self._workers.tell(address, {"op": "pcm-release", "digest": digest})
        # Nannies too: they keep the images of workers that are gone.
        drops: list[dict[str, Any]] = [{"op": "pcm_drop", "digest": digest} for digest in digests]
        await self._workers.tell_nannies(*drops)
        return n_holding
