"""The contexts of one worker: loaded when the gate asks, held by tasks, each change reported.

Contexts are built on a thread of their own and used on the lanes, so that neither delays a
heartbeat.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from distributed import Reschedule, Worker, warn
from distributed.core import Status
from distributed.threadpoolexecutor import ThreadPoolExecutor
from distributed.worker import _worker_cvar

from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import DeviceBusyError, LoadError, redacted
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.objects.host import Host
from dask_pcm.ladder.objects.tensors import device_bytes
from dask_pcm.ladder.residency import Change
from dask_pcm.ladder.store import Store
from dask_pcm.plugins.nanny.images import host_budget_bytes
from dask_pcm.plugins.nanny.plugin import NannyLink
from dask_pcm.plugins.worker.lending import WorkerLending
from dask_pcm.plugins.worker.memory import MemoryAllowance
from dask_pcm.plugins.worker.tuning import give_back_memory, tuning
from dask_pcm.tiers import Tier

logger = logging.getLogger(__name__)

#: A worker that shuts down: Dask removes its plugins before the threads of its tasks end.
ENDING = (Status.closing, Status.closed, Status.failed)
#: How long a context that is loaded waits for the imports of units.
_IMPORT_S = 60.0


class WorkerContexts:
    """Loads contexts for the gate and for tasks, and reports what becomes of them.

    Parameters
    ----------
    memory
        Raises the worker's memory limits by what contexts take.
    tell
        Sends a message to the scheduler; may be called from any thread.
    restart
        Replaces this process, whose device has failed; may be called from any thread.
    """

    def __init__(
        self,
        worker: Worker,
        config: Config,
        staging: Staging,
        nanny: NannyLink,
        memory: MemoryAllowance,
        tell: Callable[[dict[str, Any]], None],
        restart: Callable[[str], None],
    ) -> None:
        self._worker = worker
        self._config = config
        self._nanny = nanny
        self._memory = memory
        self._tell = tell
        self._restart = restart
        self._n_threads = 1
        #: Contexts that the gate has asked for. A task that needs another one hid it from the gate.
        self.wanted: set[str] = set()
        self._warned: set[str] = set()
        self._warning = threading.Lock()
        self._lane = threading.local()
        #: Imports what units need, during a load.
        self._importing: threading.Thread | None = None
        self.store = Store(
            self._report,
            staging,
            _host(worker, config, nanny),
            self._budget,
            is_mapped=config.device_budget_bytes is None,
            is_cpu_only=config.is_cpu_only,
        )
        self._lending = (
            WorkerLending(worker, config, self.store, memory, tell) if config.is_lending else None
        )
        # Dask's executor has daemon threads: a worker that ends does not wait for a load.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="pcm-load")
        # Separate from the loader: an offload that makes room must not wait behind a load.
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="pcm-move")

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call something on the loader's thread, after the loads that were asked for before."""
        future: Future[Any] = self._loader.submit(call, *args)
        return future

    def close(self) -> Future[Any]:
        """Close all contexts, on the loader's thread; the future is done when their hooks are."""
        if self._lending is not None:
            self._lending.close()
        closing = self.submit(self.store.close)
        self.submit(tuning().remove_worker, self._worker)
        self._loader.shutdown(wait=False)
        self._mover.shutdown(wait=False)
        return closing

    def lend(self, token: bytes) -> None:
        """Lend memory to workers that know the cluster's token, and borrow theirs."""
        if self._lending is not None:
            self._lending.open(token.hex())

    def on_load(
        self, ref: bytes, n_threads: int, imports: Sequence[str] = (), **kwargs: Any
    ) -> None:
        """The gate asks for a context: load it on the loader's thread.

        Meanwhile `imports` are imported, so that the first unit does not wait for them.
        """
        if missing := [name for name in imports if name not in sys.modules]:
            self._importing = threading.Thread(target=_import, args=(missing,), daemon=True)
            self._importing.start()
        wanted: ContextRef = pickle.loads(ref)
        self._n_threads = n_threads
        self.wanted.add(wanted.digest)
        self._loader.submit(self._load, wanted)

    def on_offload(self, digest: str) -> None:
        """The gate needs room for another context, or this one's idle time is over."""
        self._mover.submit(self._offload, digest)

    def on_release(self, digest: str) -> None:
        """A client has released a context."""
        self._mover.submit(self.store.release, digest)

    def _offload(self, digest: str) -> None:
        """Offload a context; the gate is told if it stays, since something holds it."""
        if not self.store.offload(digest) and self.store.tier(digest) is Tier.DEVICE:
            self._report(Change(digest, Tier.DEVICE))

    def _load(self, ref: ContextRef) -> None:
        """Load a context for the gate; on the loader's thread."""
        _worker_cvar.set(self._worker)  # a loader may acquire other contexts
        self._lane.is_loader = True
        if self.store.tier(ref.digest) is Tier.DEVICE:
            self._report(Change(ref.digest, Tier.DEVICE))  # the gate waits for an answer
            return
        try:
            with self._growing(ref):
                self.set_threads()
                self.store.load(ref)
        except LoadError:
            # The store has reported it. No longer wanted, so that a task which hides the context
            # from the gate tries to load it again.
            self.wanted.discard(ref.digest)
        except Exception as error:
            if self._worker.status in (Status.closing, Status.closed):
                return
            # An error outside the loader. Report it: the gate waits for an answer.
            logger.exception("Context %r could not be loaded", ref.name)
            text = redacted(f"{type(error).__name__}: {error}")
            self._report(Change(ref.digest, Tier.FAILED, error=text))

    @contextmanager
    def _growing(self, ref: ContextRef) -> Iterator[None]:
        """Prepare this process for a load: tuning, memory limits, and a fork server afterwards."""
        with (
            tuning().in_use(self._n_threads),
            self._memory.growing(ref.digest, self.store.mapped_bytes, self.store.host_bytes),
        ):
            yield
        if "torch" in sys.modules:  # a process that replaces this one will import it, too
            self._nanny.use_fork_server()

    def _budget(self) -> int | None:
        """What contexts may take on the device, in bytes; None for no limit. For any thread."""
        own_bytes = None if self._config.is_cpu_only else device_bytes(self._config.n_devices)
        return self._config.device_budget_bytes or own_bytes

    def _report(self, change: Change) -> None:
        """Report a residency change to the gate; on the thread that made it."""
        if change.tier is Tier.DEVICE and self._importing is not None:
            # No unit before that: two threads that import the same modules at once may see them
            # half-initialised.
            self._importing.join(_IMPORT_S)
        if change.tier is Tier.ABSENT:
            self._memory.freed(change.digest)
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
            "n_rows": change.n_rows,
            "device_bytes": self._budget() if change.tier is Tier.DEVICE else None,
        }
        self._tell(message)

    def begin_hold(self, refs: Sequence[ContextRef]) -> tuple[list[Any], ExitStack]:
        """Hold the live objects of `refs` until the stack is closed; for the thread of a task.

        Raises
        ------
        LoadError
            If a context cannot be loaded.
        Reschedule
            See ``reschedule``.
        """
        try:
            for ref in refs:
                is_there = self.store.tier(ref.digest) is Tier.DEVICE
                if ref.digest not in self.wanted and not is_there:
                    self._load_in_place(ref)
            with ExitStack() as stack:
                stack.enter_context(tuning().in_use(self._n_threads))
                # Not tried again here: the gate decides when a failed load's back-off is over.
                values, held = self.store.begin_hold(refs, again=False)
                stack.push(held)
                self.set_threads()
                return values, stack.pop_all()
        except LoadError as error:
            self.reschedule(refs, error)
            raise

    def reschedule(self, refs: Sequence[ContextRef], error: LoadError) -> None:
        """Have the task on this thread run again elsewhere, if `error` is no fault of a context.

        Raises
        ------
        Reschedule
            If the worker is shutting down, or if a context that the gate had loaded finds no room.
        """
        if self._worker.status in ENDING:  # the task runs again elsewhere in any case
            raise Reschedule from error
        is_busy = isinstance(error.__cause__, DeviceBusyError)
        if is_busy and all(ref.digest in self.wanted for ref in refs):
            # The gate had loaded all of them, but one was offloaded since: back to the gate.
            raise Reschedule from error

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

    def set_threads(self) -> None:
        """Limit torch to this worker's share of the cores; for a thread that runs torch.

        torch's setting is per thread.
        """
        torch = sys.modules.get("torch")
        if torch is None or getattr(self._lane, "n_threads", None) == self._n_threads:
            return
        if hasattr(torch, "set_num_threads"):  # not while another thread still imports it
            torch.set_num_threads(self._n_threads)
            self._lane.n_threads = self._n_threads


def _import(names: Sequence[str]) -> None:
    """Import modules ahead of their use; an error is told where they are used."""
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


def _host(worker: Worker, config: Config, nanny: NannyLink) -> Host:
    """The host tier; without a nanny it ends with this process."""
    if worker.nanny:
        return Host(nanny)
    limit = worker.memory_manager.memory_limit
    return Host(budget_bytes=host_budget_bytes(config, os.environ, limit))
