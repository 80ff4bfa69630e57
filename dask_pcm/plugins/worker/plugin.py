"""The worker plugin turns the gate's messages into loads, and residency changes into reports.

``ContextPlugin.setup`` and the message handlers run on the worker's event loop. Contexts are built
on a separate thread and used on the lanes, so that neither delays a heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from distributed import Reschedule, Worker, warn
from distributed.comm import CommClosedError
from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.threadpoolexecutor import ThreadPoolExecutor
from distributed.worker import _worker_cvar

from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import DeviceBusyError, DeviceError, LoadError, redacted
from dask_pcm.ladder.device import cpu_model, device_model
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.objects.images import Host
from dask_pcm.ladder.objects.tensors import device_bytes
from dask_pcm.ladder.residency import Change
from dask_pcm.ladder.store import Store, of_process
from dask_pcm.plugins.interrupts import Ignored
from dask_pcm.plugins.nanny.plugin import NannyLink
from dask_pcm.plugins.shipping import ShippedPlugin
from dask_pcm.plugins.signals import is_command, signals
from dask_pcm.plugins.worker.drain import Drain, ends_in_s, free, is_unbegun
from dask_pcm.plugins.worker.lanes import close_lanes, open_lanes
from dask_pcm.plugins.worker.memory import MemoryAllowance
from dask_pcm.plugins.worker.staging import Fetcher
from dask_pcm.plugins.worker.tuning import give_back_memory, tuning
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)

CONTEXTS = "pcm-contexts"
#: A worker that shuts down: Dask removes its plugins before the threads of its tasks end.
ENDING = (Status.closing, Status.closed, Status.failed)
#: Timeout of requests to the scheduler; how long the last messages need to be sent; and how long a
#: shutdown waits for tasks and for close hooks.
_TIMEOUT_S, _FAREWELL_S, _CLOSING_S = 30.0, 0.05, 2.0


class ContextPlugin(ShippedPlugin, WorkerPlugin):
    """Keeps the contexts of one worker, and the lanes on which tasks use them."""

    name = CONTEXTS
    idempotent = True  # a second registration must not tear down warm contexts

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config.read()

    def setup(self, worker: Worker) -> None:
        """Dask's hook: open the lanes, register the handlers and greet the gate."""
        self.worker = worker
        self.config = self.config.here()
        self.epoch = uuid.uuid4().hex
        self.n_threads = 1
        #: Contexts that the gate has asked for. A task that needs another one hid it from the gate.
        self._wanted: set[str] = set()
        self._warned: set[str] = set()
        #: Whether this process can no longer use its device.
        self._is_lost = False
        self._warning = threading.Lock()
        self.fetcher = Fetcher(worker, self.config, lambda: self.staging.disk, self._tell)
        self.staging = Staging(self.config, self.fetcher.fetch, self.fetcher.staged)
        self.nanny = NannyLink(worker)
        self.leaving = Drain(worker, self._tell)
        self.memory = MemoryAllowance(worker, self.nanny)
        self.store = Store(
            self._report,
            self.staging,
            Host(self.nanny if worker.nanny else None),
            self._budget,
            is_mapped=self.config.device_budget_bytes is None,
            is_cpu_only=self.config.is_cpu_only,
        )
        # Dask's executor has daemon threads: a worker that ends does not wait for a load.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="pcm-load")
        # Separate from the loader: an offload that makes room must not wait behind a load.
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="pcm-move")
        # Contexts that tasks loaded before the plugin came would be in memory twice.
        before = of_process()
        of_process.cache_clear()
        self._loader.submit(before.close)
        self._loader.submit(self.memory.begin)
        self._interrupts = Ignored()
        if worker.nanny:
            self._interrupts.begin()
            self._loader.submit(self._heed_signals_as_nanny)
        elif is_command():
            self._heed_signals()
        self._lane = threading.local()
        tuning().join(worker)
        open_lanes(worker, self.config.n_lanes)
        worker.stream_handlers["pcm-load"] = self.on_load
        worker.stream_handlers["pcm-return"] = self.on_return
        worker.stream_handlers["pcm-offload"] = self._if_now(self.on_offload)
        worker.stream_handlers["pcm-release"] = self._if_now(self.on_release)
        worker.stream_handlers["pcm-welcome"] = self._if_now(self.fetcher.on_welcome)
        worker.stream_handlers["pcm-copy"] = self._if_now(self.fetcher.on_copy)
        worker.handlers["pcm_notice"] = self.notice
        self.greet()

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

    def notice(self, seconds: float) -> None:
        """Drain within the grace period: the batch system ends this worker in `seconds`.

        The gate gets a notice and from then on sends only units that it expects to finish in time.
        The worker works on until its tasks have ended or the time is nearly over. Then its results
        go to peers, and its nanny starts no other process. For the worker's event loop; a second
        notice has no effect.
        """
        self.leaving.begin(seconds)

    def _heed_signals_as_nanny(self) -> None:
        """Treat signals as notices if the nanny does; on the loader's thread.

        Some batch systems signal all processes of a job, others only the first one.
        """
        if self.nanny.ask("pcm_heeds_signals"):
            self.worker.loop.add_callback(self._heed_signals)

    def _heed_signals(self) -> None:
        """Treat signals as notices; on the event loop."""
        if self.epoch:  # not if uninstalled in between
            signals().heed(self, self.notice, self.config.notice_s)

    def teardown(self, worker: Worker) -> Awaitable[Any] | None:
        """Dask's hook: close the contexts; the worker shuts down or only loses the plugin."""
        self.epoch = ""  # makes every later message of the scheduler stale
        worker.handlers.pop("pcm_notice", None)
        signals().leave(self)
        self.fetcher.close()
        if worker.status in (Status.running, Status.paused):  # uninstalled: the worker lives on
            self._interrupts.end()
            close_lanes(worker)
            self.memory.forget()
        else:
            self.store.end()
        self.nanny.close()
        # Even if the process ends: close hooks may have to end processes of an engine.
        closing = self._loader.submit(self.store.close)
        self._loader.submit(tuning().leave, worker)
        self._loader.shutdown(wait=False)
        self._mover.shutdown(wait=False)
        if worker.status in (Status.running, Status.paused):
            return None
        return asyncio.wait([asyncio.wrap_future(closing)], timeout=_CLOSING_S)

    def _if_now(self, handle: Callable[..., None]) -> Callable[..., None]:
        """Wrap a handler so that it ignores stale messages, which were sent to another epoch."""

        def handle_now(epoch: str, **says: Any) -> None:
            if epoch == self.epoch:
                handle(**says)

        return handle_now

    def on_load(self, epoch: str, ref: bytes, n_threads: int, **kwargs: Any) -> None:
        """The gate asks for a context: load it on the loader's thread."""
        if epoch != self.epoch:
            return
        wanted: ContextRef = pickle.loads(ref)
        self.n_threads = n_threads
        self._wanted.add(wanted.digest)
        self._loader.submit(self._load, wanted)

    def on_offload(self, digest: str) -> None:
        """The gate needs room for another context, or this one's idle time is over."""
        self._mover.submit(self.store.offload, digest)

    def on_release(self, digest: str) -> None:
        """A client has released a context."""
        self._mover.submit(self.store.release, digest)

    def on_return(self, epoch: str, keys: Sequence[Any], **kwargs: Any) -> None:
        """The gate asks for tasks back: free those that have not begun, and name them in the reply.

        Only the worker knows which have begun; whatever it freed may run elsewhere.
        """
        if epoch != self.epoch:
            return
        tasks = ((key, self.worker.state.tasks.get(key)) for key in keys)
        unbegun = [key for key, ts in tasks if ts is not None and is_unbegun(ts)]
        free(self.worker, unbegun)
        message = {"op": "pcm-returned", "epoch": self.epoch, "keys": unbegun}
        self.worker.batched_stream.send(message)

    def _load(self, ref: ContextRef) -> None:
        """Load a context for the gate; on the loader's thread."""
        _worker_cvar.set(self.worker)  # a loader may acquire other contexts
        self._lane.is_loader = True
        if self.store.tier(ref.digest) is Tier.DEVICE:
            self._report(Change(ref.digest, Tier.DEVICE))  # the gate waits for an answer
            return
        try:
            with self._growing(ref):
                self._set_threads()
                self.store.load(ref)
        except LoadError:
            # The store has reported it. No longer wanted, so that a task which hides the context
            # from the gate tries to load it again.
            self._wanted.discard(ref.digest)
        except Exception as error:
            if self.worker.status in (Status.closing, Status.closed):
                return
            # An error outside the loader. Report it: the gate waits for an answer.
            logger.exception("Context %r could not be loaded", ref.name)
            text = redacted(f"{type(error).__name__}: {error}")
            self._report(Change(ref.digest, Tier.FAILED, error=text))

    @contextmanager
    def _growing(self, ref: ContextRef) -> Iterator[None]:
        """Prepare this process for a load: tuning, memory limits, and a fork server afterwards."""
        with (
            tuning().in_use(self.n_threads),
            self.memory.growing(ref.digest, self.store.mapped_bytes),
        ):
            yield
        if "torch" in sys.modules:  # a process that replaces this one will import it, too
            self.nanny.use_fork_server()

    def _budget(self) -> int | None:
        """What contexts may take on the device, in bytes; None for no limit. For any thread."""
        own_bytes = None if self.config.is_cpu_only else device_bytes()
        return self.config.device_budget_bytes or own_bytes

    def _report(self, change: Change) -> None:
        """Report a residency change to the gate; on the thread that made it."""
        if change.tier is Tier.ABSENT:
            self.memory.freed(change.digest)
        if change.tier in (Tier.ABSENT, Tier.HOST):
            give_back_memory()
        if change.is_sticky:
            self._restart("its device failed while a context was loaded")
        message = {
            "op": "pcm-residency",
            "digest": change.digest,
            "tier": change.tier.value,
            "seconds": change.seconds,
            "error": change.error,
            "is_built": change.is_built,
            "n_bytes": change.n_bytes,
            "kind": change.kind,
            "staged_s": change.staged_s,
            "device_bytes": self._budget() if change.tier is Tier.DEVICE else None,
        }
        self._tell(message)

    def _tell(self, message: dict[str, Any]) -> None:
        """Send a message to the scheduler, from any thread."""
        self.worker.loop.add_callback(self._send, {**message, "epoch": self.epoch})

    def _send(self, message: dict[str, Any]) -> None:
        """Send a message to the scheduler; on the event loop."""
        with suppress(CommClosedError):  # without a scheduler, Dask closes this worker soon
            self.worker.batched_stream.send(message)

    @contextmanager
    def acquire(self, refs: Sequence[ContextRef]) -> Iterator[list[Any]]:
        """Hold the live objects of `refs`; for the thread of a task.

        Raises
        ------
        LoadError
            If a context cannot be loaded.
        Reschedule
            If the worker is shutting down, or if a context that the gate had loaded finds no room.
        """
        try:
            for ref in refs:
                is_there = self.store.tier(ref.digest) is Tier.DEVICE
                if ref.digest not in self._wanted and not is_there:
                    self._load_in_place(ref)
            # Not tried again here: the gate decides when a failed load's back-off is over.
            with (
                tuning().in_use(self.n_threads),
                self.store.acquire(refs, again=False) as values,
            ):
                self._set_threads()
                yield values
        except LoadError as error:
            if self.worker.status in ENDING:  # the task runs again elsewhere in any case
                raise Reschedule from error
            is_busy = isinstance(error.__cause__, DeviceBusyError)
            if is_busy and all(ref.digest in self._wanted for ref in refs):
                # The gate had loaded all of them, but one was offloaded since: back to the gate.
                raise Reschedule from error
            raise

    def _load_in_place(self, ref: ContextRef) -> None:
        """Load a context that the gate did not see, in the middle of a task; warn once."""
        with self._warning:
            # No warning for contexts that a loader acquires: the user could not have passed them
            # as arguments of the task.
            is_new = ref.digest not in self._warned and not getattr(self._lane, "is_loader", False)
            self._warned.add(ref.digest)
        if is_new:
            self._warn(ref)
        try:
            with self._growing(ref):
                self.store.load(ref, again=not self.store.is_backing_off(ref.digest))
        except LoadError as error:
            error.add_note("During the back-off, tasks get this error without another attempt.")
            raise

    def _warn(self, ref: ContextRef) -> None:
        """Warn the user that the gate could not see a context."""
        warn(
            f"Context {ref.name!r} is loaded in the middle of a task: the gate could not see that"
            " the task needs it, because it is hidden in a closure, a callable object, a scattered"
            " value or a very long list. Pass it as an argument of the task, for instance"
            " client.map(func, items, model=context)."
        )

    def lose_device(self, error: BaseException) -> None:
        """Replace this process, whose device has failed in a task; for the task's thread.

        Raises
        ------
        Reschedule
            So that the task runs again, in another process.
        DeviceError
            If the task has failed in too many processes: the task itself may be the cause. Or if
            there is no nanny to start another process.
        """
        if not self.worker.nanny:
            raise DeviceError(
                f"The process of {self.worker.address} can no longer use its device, and has no"
                f" nanny to start another process: {error}. Start workers with nannies."
            ) from error
        is_first = not self._is_lost
        self._restart(f"it can no longer use its device ({error})")
        key = self.worker.get_current_task()
        told = asyncio.run_coroutine_threadsafe(
            self.worker.scheduler.pcm_lost_device(key=key, is_cause=is_first),
            self.worker.loop.asyncio_loop,
        )
        n_times: int = told.result(_TIMEOUT_S)
        if n_times < self.config.n_load_attempts:
            raise Reschedule from error
        raise DeviceError(
            f"Task {key!r} lost {n_times} worker processes, which could no longer use their device."
            f" The last error: {error}"
        ) from error

    def _restart(self, why: str) -> None:
        """Start to replace this process, once; for any thread. Needs a nanny."""
        if not self._is_lost and self.worker.nanny:
            self._is_lost = True
            logger.error("The process of worker %s is replaced: %s", self.worker.address, why)
            self.worker.loop.add_callback(self._leave, why)

    async def _leave(self, why: str) -> None:
        """Close this process and start a new one, once results of running tasks have been sent."""
        if self.worker.status is Status.running:
            self.worker.status = Status.paused  # no further task begins here
        deadline = time.monotonic() + _CLOSING_S
        while self.worker.state.executing and time.monotonic() < deadline:
            await asyncio.sleep(_FAREWELL_S)
        await asyncio.sleep(_FAREWELL_S)
        await self.worker.close_gracefully(restart=not self.leaving.is_begun, reason=why)

    def _set_threads(self) -> None:
        """Limit torch to this worker's share of the cores; for the thread that runs torch.

        torch's setting is per thread.
        """
        torch = sys.modules.get("torch")
        if torch is None or getattr(self._lane, "n_threads", None) == self.n_threads:
            return
        if hasattr(torch, "set_num_threads"):  # not while another thread still imports it
            torch.set_num_threads(self.n_threads)
            self._lane.n_threads = self.n_threads
