"""Clients report how much work their runs will still submit, and get the state of contexts back."""

from __future__ import annotations

import pickle
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask_pcm.context.context import ContextRef
from dask_pcm.plugins.scheduler.contexts import ContextService, LoadReports
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.scheduling.events import Group, RunClosed, RunReported
from dask_pcm.scheduling.feed.demand import device_demand
from dask_pcm.scheduling.rules.device_fit import why_too_large

#: Runs whose contexts are known, at most.
_MOST_KNOWN = 1000


@dataclass(frozen=True, slots=True)
class RunInfo:
    """An open run.

    Attributes
    ----------
    client
        The id of the client that drives it.
    contexts
        Digests of the contexts that its units need.
    """

    client: str
    contexts: tuple[str, ...]


class RunService(Service):
    """Open runs, by id.

    Attributes
    ----------
    runs
        Those that are open.
    contexts_of
        Digests of the contexts of a run, also of the latest that are paused or over.
    """

    def __init__(self, hub: Hub, contexts: ContextService) -> None:
        self._hub = hub
        self._contexts = contexts
        self.runs: dict[str, RunInfo] = {}
        self.contexts_of: dict[str, tuple[str, ...]] = {}

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """See ``Service``."""
        return {"pcm_run": self.on_run, "pcm_too_large": self.on_too_large}

    async def on_too_large(self, refs: bytes) -> str:
        """Why the contexts of a run that is to begin fit no device, in words; "" if they may fit.

        Asked before the run opens: nothing is submitted, loaded or scaled for it.
        """
        asked: tuple[ContextRef, ...] = pickle.loads(refs)
        state = self._hub.state
        sizes = {ref.digest: self._contexts.size_of(ref) for ref in asked}
        names = list({ref.digest: ref.name for ref in asked}.values())
        return why_too_large(state, names, sum(sizes.values()), state.workers.values())

    async def on_run(
        self, run: str, client: str, refs: bytes, kind: str, n_rows: float, n_units: int
    ) -> dict[str, Any]:
        """A client reports what a run will still submit; return the state of its contexts.

        The first report opens the run, so workers load its contexts before any unit arrives.
        `n_units` of 0 closes it.
        """
        # Safe without the user's modules: the recipes inside the refs are sealed.
        asked: tuple[ContextRef, ...] = pickle.loads(refs)
        contexts = tuple(ref.digest for ref in asked)
        group = Group(contexts, kind, client=client)
        if not n_units:
            self._close_run(run)
        else:
            if run not in self.runs:
                self.runs[run] = RunInfo(client, self._contexts.declare(asked))
                self.contexts_of[run] = contexts
                if len(self.contexts_of) > _MOST_KNOWN:
                    del self.contexts_of[next(iter(self.contexts_of))]
            # After `declare`: the policy must know the contexts of the work that it plans.
            self._hub.apply(RunReported(run, group, n_rows, n_units))
        loads = [self._contexts.loads.get(context, LoadReports()) for context in contexts]
        state = self._hub.state
        return {
            "n_workers": len(state.workers),
            "n_on_cluster": len(self._hub.scheduler.workers),
            "n_warm": sum(view.holds(contexts) for view in state.workers.values()),
            "n_loads": sum(load.n for load in loads),
            "load_s": sum(load.seconds for load in loads),
            "demand": [tuple(one) for one in device_demand(state, group)],
        }

    def client_left(self, client: str) -> None:
        """See ``Service``; closes the client's runs, since nothing else would."""
        for run in [run for run, info in self.runs.items() if info.client == client]:
            self._close_run(run)

    def restarted(self) -> None:
        """See ``Service``; a run that goes on reports itself again."""
        for run in list(self.runs):
            self._close_run(run)

    def tick(self) -> None:
        """See ``Service``."""
        if self.runs:
            self._hub.wake()

    def _close_run(self, run: str) -> None:
        """Close a run, once: its driver and the loss of its client may both do so."""
        info = self.runs.pop(run, None)
        if info is not None:
            self._hub.apply(RunClosed(run))
            self._contexts.refs.discard(info.contexts)
