"""The worker plugin: Dask's hooks, the gate's messages, and the services that they go to.

Each service has one concern: contexts, questions, staging, memory limits, draining, a lost device.
Hooks and message handlers run on the worker's event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from distributed import Worker
from distributed.comm import CommClosedError
from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin

from dask_pcm.config import Config
from dask_pcm.ladder.device import cpu_model, device_model
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.store import of_process
from dask_pcm.plugins.interrupts import Ignored
from dask_pcm.plugins.nanny.plugin import NannyLink
from dask_pcm.plugins.shipping import ShippedPlugin
from dask_pcm.plugins.signals import is_command, signals
from dask_pcm.plugins.worker.contexts import WorkerContexts
from dask_pcm.plugins.worker.device_loss import DeviceLoss
from dask_pcm.plugins.worker.drain import Drain, ends_in_s, free, is_unbegun
from dask_pcm.plugins.worker.lanes import close_lanes, open_lanes
from dask_pcm.plugins.worker.memory import MemoryAllowance
from dask_pcm.plugins.worker.questions import Questions
from dask_pcm.plugins.worker.staging import Fetcher
from dask_pcm.plugins.worker.tuning import tuning

logger = logging.getLogger(__name__)

CONTEXTS = "pcm-contexts"
#: How long a shutdown waits for close hooks, in seconds.
_CLOSING_S = 2.0


class ContextPlugin(ShippedPlugin, WorkerPlugin):
    """The gate's part in one worker, for as long as the plugin is installed there.

    Attributes
    ----------
    epoch
        Identifies this life of the plugin in every message; empty once it is torn down.
    """

    name = CONTEXTS
    idempotent = True  # a second registration must not tear down warm contexts

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config.read()

    def setup(self, worker: Worker) -> None:
        """Dask's hook: open the lanes, register the handlers and greet the gate."""
        self.worker = worker
        self.config = self.config.here()
        self.epoch = uuid.uuid4().hex
        self.fetcher = Fetcher(worker, self.config, lambda: self.staging.disk, self.tell)
        self.staging = Staging(self.config, self.fetcher.fetch, self.fetcher.staged)
        self.nanny = NannyLink(worker)
        self.drain = Drain(worker, self.tell, lambda: self.questions)
        self.memory = MemoryAllowance(worker, self.nanny)
        self.device = DeviceLoss(worker, self.config.n_load_attempts, lambda: self.drain.is_begun)
        self.contexts = WorkerContexts(
            worker,
            self.config,
            self.staging,
            self.nanny,
            self.memory,
            self.tell,
            self.device.restart,
        )
        self.questions = Questions(self.contexts, self.tell, self.device.restart)
        # Contexts that tasks loaded before the plugin came would be in memory twice.
        before = of_process()
        of_process.cache_clear()
        self.contexts.submit(before.close)
        self.contexts.submit(self.nanny.begin)
        self.contexts.submit(self.memory.begin)
        self._interrupts = Ignored()
        if worker.nanny:
            self._interrupts.begin()
            self.contexts.submit(self._listen_to_signals_as_nanny)
        elif is_command():
            self._listen_to_signals()
        tuning().add_worker(worker)
        open_lanes(worker, self.config.n_lanes)
        for op, handle in self._stream_handlers().items():
            worker.stream_handlers[op] = self._if_now(handle)
        worker.handlers["pcm_notice"] = self.notice
        self.greet()

    def _stream_handlers(self) -> dict[str, Callable[..., None]]:
        """Handlers of the scheduler's messages, by operation."""
        return {
            "pcm-load": self.contexts.on_load,
            "pcm-offload": self.contexts.on_offload,
            "pcm-release": self.contexts.on_release,
            "pcm-return": self.on_return,
            "pcm-ask": self.questions.on_ask,
            "pcm-unask": self.questions.on_cancel,
            "pcm-welcome": self.on_welcome,
            "pcm-copy": self.fetcher.on_copy,
        }

    def greet(self) -> None:
        """Greet the gate; without effect if it knows this epoch already. On the event loop."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        found = cpu_model() if self.config.is_cpu_only else device_model()
        device = self.config.device or found
        self.worker.batched_stream.send(
            {
                "op": "pcm-hello",
                "epoch": self.epoch,
                "n_lanes": self.config.n_lanes,
                "cores": cores or list(range(os.cpu_count() or 1)),
                "device_bytes": self.config.device_budget_bytes,
                "device": device,
                "pool": self.config.pool or device,
                "ends_in_s": ends_in_s(self.config.walltime_s),
            }
        )

    def notice(self, seconds: float, is_preempted: bool = True) -> None:
        """Drain within the grace period: the batch system ends this worker in `seconds`.

        The gate gets a notice and from then on sends only units that it expects to finish in time.
        The worker works on until its tasks have ended or the time is nearly over. Then its results
        go to peers, and its nanny starts no other process. For the worker's event loop; of
        several notices, the earliest end counts.

        If not `is_preempted`, its cluster gives it back: it gets nothing more, and ends as soon as
        what it has begun is done, a unit's batch for instance.
        """
        self.drain.begin(seconds, is_preempted)

    def _listen_to_signals_as_nanny(self) -> None:
        """Treat signals as notices if the nanny does; on the loader's thread.

        Some batch systems signal all processes of a job, others only the first one.
        """
        if self.nanny.ask("pcm_listens_to_signals"):
            self.worker.loop.add_callback(self._listen_to_signals)

    def _listen_to_signals(self) -> None:
        """Treat signals as notices; on the event loop."""
        if self.epoch:  # not if uninstalled in between
            signals().listen(self, self.notice, self.config.notice_s)

    def teardown(self, worker: Worker) -> Awaitable[Any] | None:
        """Dask's hook: close the contexts; the worker shuts down or only loses the plugin."""
        self.epoch = ""  # makes every later message of the scheduler stale
        worker.handlers.pop("pcm_notice", None)
        signals().ignore(self)
        self.fetcher.close()
        self.questions.close()
        if worker.status in (Status.running, Status.paused):  # uninstalled: the worker lives on
            self._interrupts.end()
            close_lanes(worker)
            self.memory.forget()
        else:
            self.contexts.store.end()
            if worker.nanny or is_command():  # the process is the worker's own
                # Python would look for cycles among all objects of torch and others: seconds.
                atexit.register(gc.freeze)
        self.nanny.close()
        # Even if the process ends: close hooks may have to end processes of an engine.
        closing = self.contexts.close()
        if worker.status in (Status.running, Status.paused):
            return None
        return asyncio.wait([asyncio.wrap_future(closing)], timeout=_CLOSING_S)

    def _if_now(self, handle: Callable[..., None]) -> Callable[..., None]:
        """Wrap a handler so that it ignores stale messages, which were sent to another epoch."""

        def handle_now(epoch: str, **says: Any) -> None:
            if epoch == self.epoch:
                handle(**says)

        return handle_now

    def on_welcome(self, token: bytes) -> None:
        """The gate, perhaps a new one, has sent the cluster's token."""
        self.fetcher.on_welcome(token)
        self.contexts.lend(token)

    def on_return(self, keys: Sequence[Any], **kwargs: Any) -> None:
        """The gate asks for tasks back: free those that have not begun, and name them in the reply.

        Only the worker knows which have begun; what it freed may run elsewhere.
        """
        tasks = ((key, self.worker.state.tasks.get(key)) for key in keys)
        unbegun = [key for key, ts in tasks if ts is not None and is_unbegun(ts)]
        free(self.worker, unbegun)
        message = {"op": "pcm-returned", "epoch": self.epoch, "keys": unbegun}
        self.worker.batched_stream.send(message)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the scheduler, from any thread."""
        self.worker.loop.add_callback(self._send, {**message, "epoch": self.epoch})

    def _send(self, message: dict[str, Any]) -> None:
        """Send a message to the scheduler; on the event loop."""
        with suppress(CommClosedError):  # without a scheduler, Dask closes this worker soon
            self.worker.batched_stream.send(message)
