"""Names, sizes and staged files of the contexts that the gate knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from dask_pcm.scheduling.events import ContextDeclared, ResidencyReported
from dask_pcm.scheduling.learned.cost import CostModel
from dask_pcm.scheduling.state.worker import WorkerView
from dask_pcm.tiers import Tier


@dataclass(slots=True)
class ContextTable:
    """What is known of each context, by its digest.

    Attributes
    ----------
    names
        Names for messages.
    sizes
        Bytes on a device, declared or measured; a context of unknown size is absent.
    measured
        Contexts whose size a worker has measured; a declaration does not overwrite it.
    file_bytes
        Bytes of the files that a worker stages before it builds the context.
    staged_on
        Hosts that hold the files.
    needs
        Bytes that a context has needed beside its device, on one worker at most.
    """

    names: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    file_bytes: dict[str, int] = field(default_factory=dict)
    staged_on: dict[str, set[str]] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)

    def size(self, context: str) -> int:
        """Bytes of a context on a device; 0 while unknown."""
        return self.sizes.get(context, 0)

    def declare(self, event: ContextDeclared) -> int | None:
        """Take in a declaration; return the declared size, or None where a better one is known."""
        self.names[event.context] = event.name
        self.file_bytes[event.context] = event.file_bytes
        return None if event.context in self.measured else event.n_bytes

    def observe_warm(self, view: WorkerView, report: ResidencyReported, cost: CostModel) -> None:
        """Learn costs from a context that has become warm on a worker."""
        context, file_bytes = report.context, self.file_bytes.get(report.context, 0)
        staged_on = self.staged_on.setdefault(context, set())
        # A host that had some of the files already would make staging look too cheap.
        if report.staged_s and view.host not in staged_on:
            cost.observe_staged(context, report.staged_s, file_bytes)
        if report.seconds:
            seconds, n_bytes = report.seconds - report.staged_s, self.sizes.get(context, 0)
            cost.observe_warm(context, view.device, seconds, report.is_built, n_bytes)
        if report.is_built:
            staged_on.add(view.host)

    def warm_s(self, view: WorkerView, context: str, cost: CostModel) -> float:
        """Estimated seconds to bring a context to a worker's device."""
        n_bytes = self.sizes.get(context, 0)
        if view.tiers.get(context) is Tier.HOST:
            return cost.restore_s(context, view.device, n_bytes)
        load_s = cost.load_s(context, view.device, n_bytes)
        if view.host in self.staged_on.get(context, ()):
            return load_s
        return load_s + cost.stage_s(context, self.file_bytes.get(context, 0))
