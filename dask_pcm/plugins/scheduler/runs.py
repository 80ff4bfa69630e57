"""Runs that clients drive: what they still will submit, and how their contexts are doing."""

from __future__ import annotations

import pickle
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask_pcm.context.context import ContextRef
from dask_pcm.plugins.scheduler.contexts import Contexts, Loads
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.scheduling.events import Group, RunClosed, RunReported


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run that is open.

    Attributes
    ----------
    contexts
        Digests of the contexts that its units need.
    """

    client: str
    contexts: tuple[str, ...]


class Runs(Service):
    """Runs that are open, by their ids."""

    def __init__(self, hub: Hub, contexts: Contexts) -> None:
        self._hub = hub
        self._contexts = contexts
        self.runs: dict[str, RunInfo] = {}

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return {"pcm_run": self.on_run}

    async def on_run(
        self, run: str, client: str, refs: bytes, kind: str, n_rows: float, n_units: int
    ) -> dict[str, Any]:
        """A client reports what a run will still submit, and learns how its contexts are doing.

        `n_units` of 0 closes the run.
        """
        asked: tuple[ContextRef, ...] = pickle.loads(refs)
        contexts = tuple(ref.digest for ref in asked)
        group = Group(contexts, kind, client=client)
        if not n_units:
            self._close_run(run)
        else:
            if run not in self.runs:
                self.runs[run] = RunInfo(client, self._contexts.declare(asked))
            self._hub.apply(RunReported(run, group, n_rows, n_units))
        loads = [self._contexts.loads.get(context, Loads()) for context in contexts]
        state = self._hub.state
        return {
            "n_workers": len(state.workers),
            "n_on_cluster": len(self._hub.scheduler.workers),
            "n_warm": sum(view.holds(contexts) for view in state.workers.values()),
            "n_loads": sum(load.n for load in loads),
            "load_s": sum(load.seconds for load in loads),
            "askers": [tuple(one) for one in state.askers(group)],
        }

    def client_left(self, client: str) -> None:
        for run in [run for run, info in self.runs.items() if info.client == client]:
            self._close_run(run)

    def restarted(self) -> None:
        for run in list(self.runs):
            self._close_run(run)

    def tick(self) -> None:
        if self.runs:
            self._hub.wake()

    def _close_run(self, run: str) -> None:
        info = self.runs.pop(run, None)
        if info is not None:
            self._hub.apply(RunClosed(run))
            self._contexts.refs.discard(info.contexts)
