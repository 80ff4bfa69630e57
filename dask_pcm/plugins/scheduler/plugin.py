"""The scheduler plugin translates Dask's hooks into calls of the gate's services.

Tasks that need a context are parked (``parking.py``). The policy decides which worker gets one, and
``dispatch.py`` sends it there. Everything here runs on the scheduler's event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState
from tornado.ioloop import PeriodicCallback

from dask_pcm.config import Config
from dask_pcm.plugins.scheduler.contexts import ContextService
from dask_pcm.plugins.scheduler.first_batches import FailingFrames
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.placing import Placing
from dask_pcm.plugins.scheduler.questions import QuestionService
from dask_pcm.plugins.scheduler.runs import RunService
from dask_pcm.plugins.scheduler.scaling import Scaling
from dask_pcm.plugins.scheduler.staging import StagingCoordinator
from dask_pcm.plugins.scheduler.tasks import parking
from dask_pcm.plugins.scheduler.tasks.attribution import Attribution
from dask_pcm.plugins.scheduler.tasks.dispatch import Dispatch
from dask_pcm.plugins.scheduler.tasks.losses import Losses
from dask_pcm.plugins.scheduler.tasks.parked import ParkedTasks
from dask_pcm.plugins.scheduler.workers import Workers
from dask_pcm.scheduling.events import Restarted, WorkEnded
from dask_pcm.scheduling.state.state import GateState

GATE = "pcm-gate"
#: Prefixes of the stimulus ids with which Dask removes a worker that was lost, not retired.
_LOST = ("handle-worker-cleanup", "check-worker-ttl")


class GatePlugin(SchedulerPlugin):
    """Parks tasks that need a context and dispatches them as the policy decides.

    Attributes
    ----------
    hub
        The gate's state, and the way in for events; set by ``start``.
    """

    name = GATE
    idempotent = True  # a second registration must not replace the one that has parked tasks
    hub_type: ClassVar[type[Hub]] = Hub

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config.read()

    @property
    def state(self) -> GateState:
        """The gate's state."""
        return self.hub.state

    async def start(self, scheduler: Scheduler) -> None:
        """Make the services, register their handlers, and park the tasks that are there."""
        hub = self.hub = self.hub_type(scheduler, self.config)
        attribution = Attribution(scheduler)
        self.workers = Workers(hub)
        self.contexts = ContextService(hub, self.workers)
        self.parked = ParkedTasks(hub, self.contexts, attribution)
        self.dispatch = Dispatch(hub, self.workers, self.contexts, self.parked)
        self.losses = Losses(hub, self.parked, attribution)
        self.runs = RunService(hub, self.contexts)
        self.questions = QuestionService(hub, self.workers, self.contexts, self.runs)
        self.staging = StagingCoordinator(self.workers)
        self.scaling = Scaling(hub)
        frames = FailingFrames(scheduler)
        hub.services = (
            self.workers,
            self.contexts,
            self.losses,
            self.parked,
            self.dispatch,
            self.runs,
            self.questions,
            self.staging,
            self.scaling,
            Placing(hub),
            frames,
        )
        hub.carry_out = self.dispatch.carry_out
        for service in hub.services:
            scheduler.handlers.update(service.handlers())
            current = {op: self._if_current(h) for op, h in service.stream_handlers().items()}
            scheduler.stream_handlers.update(current)
        # These two without the check of the epoch: a greeting announces a new one, and Dask's own
        # message has none.
        scheduler.stream_handlers["pcm-hello"] = self.workers.on_hello
        scheduler.stream_handlers["long-running"] = self.dispatch.on_long_running
        self._ticker = PeriodicCallback(self._tick, self.config.tick_s * 1000)
        self._ticker.start()
        self.parked.take_over()

    def _if_current(self, handle: Callable[..., None]) -> Callable[..., None]:
        """Wrap a handler so that it ignores stale messages, from an earlier epoch of a worker."""

        def handle_current(worker: str, epoch: str, **fields: Any) -> None:
            if self.workers.is_current(worker, epoch):
                handle(worker, **fields)

        return handle_current

    async def close(self) -> None:
        """Dask's hook: the scheduler closes."""
        self._ticker.stop()
        for service in self.hub.services:
            service.close()

    def uninstall(self) -> None:
        """Remove the plugin from the scheduler; parked tasks continue as plain Dask tasks.

        The handlers stay registered, because workers and runs may still send messages. They ignore
        these, since no worker is a member any more; only a dispatched task may still secede.
        """
        self._ticker.stop()
        self.hub.scheduler.remove_plugin(GATE)
        for service in self.hub.services:
            service.close()
            service.uninstall()
        self.hub.reset()

    # -- Dask's hooks -----------------------------------------------------------------------

    def update_graph(
        self, scheduler: Scheduler, *, tasks: list[Any], client: str = "", **kwargs: Any
    ) -> None:
        """Dask's hook: a client has submitted tasks."""
        self.parked.add(tasks, client)

    def transition(
        self, key: Any, start: str, finish: str, *args: Any, stimulus_id: str, **kwargs: Any
    ) -> None:
        """Dask's hook: a task changed its state, which is ``finish`` now."""
        if key in self.parked.asked:
            if start == "processing":
                self._leave_worker(key, is_finished=finish == "memory")
            if finish == "no-worker":
                if not self.losses.is_open(key):
                    self.parked.park(key)
            elif start == "no-worker" and finish != "processing":
                self.parked.withdraw(key)
            if finish == "forgotten":
                self.parked.forget(key)
        if finish == "forgotten":
            self.losses.forget(key)

    def _leave_worker(self, key: Any, is_finished: bool) -> None:
        """A task has left ``processing``."""
        ts = self.hub.scheduler.tasks.get(key)
        if ts is not None:
            self.losses.task_left(ts)
        if is_finished:
            self.parked.unfinished.discard(key)
        else:
            self.parked.unfinished.add(key)
        self.hub.apply(WorkEnded(key, is_finished))
        if ts is not None:
            # After success too: if the result is lost later, the task runs again, and has to go
            # through the gate then.
            parking.park(ts)

    def remove_worker(
        self, scheduler: Scheduler, worker: str, *, stimulus_id: str = "", **kwargs: Any
    ) -> None:
        """Dask's hook: a worker was removed."""
        self.workers.remove_worker(worker, is_lost=stimulus_id.startswith(_LOST))

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Dask's hook: a client has disconnected."""
        for service in self.hub.services:
            service.client_left(client)

    def restart(self, scheduler: Scheduler) -> None:
        """Dask's hook: a client restarts the cluster."""
        self.hub.apply(Restarted())
        for service in self.hub.services:
            service.restarted()

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Dask's hook: which of these workers may be retired."""
        return self.scaling.removable(workers)

    def _tick(self) -> None:
        """Called every ``pcm.gate.tick``."""
        self._be_last()
        for service in self.hub.services:
            service.tick()
        if self.hub.config.idle_s is not None:
            self.hub.wake()

    def _be_last(self) -> None:
        """Move this plugin behind all others, so that restrictions which they set are respected."""
        plugins = self.hub.scheduler.plugins
        if next(reversed(plugins)) != GATE and GATE in plugins:
            plugins[GATE] = plugins.pop(GATE)
