"""What a task calls to get at live objects, wherever it runs."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distributed import Reschedule, get_worker, warn

from dask_pcm.context.context import Context, ContextRef
from dask_pcm.errors import RecipeError
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.ladder.store import of_process
from dask_pcm.plugins.worker.plugin import CONTEXTS, ENDING, ContextPlugin
from dask_pcm.plugins.worker.seceding import giving_back
from dask_pcm.plugins.worker.tally import Tally
from dask_pcm.scheduling.rules.first_batches import Failing

logger = logging.getLogger(__name__)

#: The annotation of a task that was lost with its worker before.
LOST = "pcm_lost"
_TIMEOUT_S = 30.0


@contextmanager
def acquire(*contexts: Context) -> Iterator[Any]:
    """Inside a task of your own, hold the live object of a context.

    Hand the context over as an argument of the task: the gate then sees it, and sends the task to
    a worker that holds it. Hidden in a closure, a callable object or a scattered value it is not
    seen; the object is then built where the task happens to run, with a warning.

    Parameters
    ----------
    *contexts
        One ``Context``, or several: then a list of their objects is handed out. Take several in
        one call: tasks that take them one by one, in other orders, wait for each other.

    Yields
    ------
    object
        What the loader returned. An exclusive context has one holder at a time in a worker; until
        the block ends it is not evicted. Outside a cluster it is built in this process and kept.
        While the task has seceded (``compute()``, ``worker_client()``, ``secede()``), others may
        use it: do so yourself before that, or after it has rejoined.

    Raises
    ------
    LoadError
        Where the context cannot be built.
    DeadlockError
        Where tasks that take several one by one, in other orders, would wait for each other.
    RecipeError
        Where it is called in a coroutine, or with something else than a context.

    Examples
    --------
    >>> def length(text, model):
    ...     with acquire(model) as live:
    ...         return live(text)
    >>> length("claim", Context(lambda: len))  # in a notebook: client.map(length, texts, model=...)
    5
    """
    if _is_in_loop():
        raise RecipeError(
            "acquire would hold up the worker's event loop: a coroutine runs on it, and so does"
            " every heartbeat. Make the task a plain function, def instead of async def."
        )
    for context in contexts:
        if not isinstance(context, Context):
            raise RecipeError(f"acquire takes a dask_pcm.Context; found {context!r:.80}.")
    with hold([context.ref for context in contexts]) as values:
        yield values[0] if len(values) == 1 else values


def _is_in_loop() -> bool:
    """Whether this runs on a worker's event loop; a notebook's own loop is nobody's business."""
    try:
        return get_worker().loop.asyncio_loop is asyncio.get_running_loop()
    except (ValueError, RuntimeError):  # no worker; no loop
        return False


class TaskStats(threading.local):
    """What the task on this thread did with contexts.

    Attributes
    ----------
    infer_s
        Seconds that it has held them.
    facts
        What they say of themselves in a mapping ``facts``: device, dtype.
    is_by_rows, errors
        Whether a function was called by rows, and the errors that it ended with.
    tallies
        What functions by rows have come to in a unit of a run, by their digests.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new task begins on this thread."""
        self.infer_s = 0.0
        self.facts: dict[str, str] = {}
        self.is_by_rows = False
        self.errors: list[str] = []
        self.tallies: dict[str, Tally] = {}

    def failing(self) -> tuple[Failing | None, bytes]:
        """Whether a function failed on all rows of a unit, and how; no batches where none ran."""
        for tally in self.tallies.values():
            if (failing := tally.failing) is not None:
                return failing, tally.error
        return None if self.tallies else Failing(0), b""


task_stats = TaskStats()


@contextmanager
def hold(refs: Sequence[ContextRef]) -> Iterator[list[Any]]:
    """Hold the live objects of `refs`, wherever this runs.

    On a worker with our plugin they are warm: the gate saw to that. Elsewhere (another Dask
    scheduler, a worker without the plugin) they are loaded once in this process and kept.
    """
    source = _plugin() or of_process()
    store = source.store if isinstance(source, ContextPlugin) else source
    with source.acquire(refs) as values, giving_back(store.turns):
        start = time.perf_counter()
        for value in values:
            if isinstance(facts := getattr(value, "facts", None), Mapping):
                task_stats.facts.update(facts)
        try:
            yield values
        except Exception as error:
            if isinstance(source, ContextPlugin) and is_sticky(error):
                source.lose_device(error)
            raise
        finally:
            task_stats.infer_s += time.perf_counter() - start


def was_lost() -> bool:
    """Whether the task on this thread was on a worker before that was lost, whatever the cause."""
    try:
        worker = get_worker()
        ts = worker.state.tasks.get(worker.get_current_task())
    except (ValueError, KeyError):  # no worker; no task of it
        return False
    return ts is not None and bool((ts.annotations or {}).get(LOST))


def n_losses() -> int:
    """How many worker processes the task on this thread has cost since this was last asked.

    Only those count that ended by a fault of their own, a crash or an OOM kill; those that were
    taken away with their machine do not. May take seconds: whose fault it was is not known at once.
    Asking is what keeps the gate from ending a task that has cost several, so whoever asks must
    have got further since. Where nobody can tell, none count.
    """
    if not was_lost():
        return 0
    worker = get_worker()
    key = worker.get_current_task()
    asked = asyncio.run_coroutine_threadsafe(
        worker.scheduler.pcm_losses(key=key), worker.loop.asyncio_loop
    )
    try:
        found = asked.result(_TIMEOUT_S)
    except Exception as error:
        logger.warning("Whether %s has cost processes is not known: %r", key, error)
        return 0
    return int(found or 0)  # a scheduler without the gate answers nothing


def _plugin() -> ContextPlugin | None:
    try:
        worker = get_worker()
    except ValueError:
        return None
    plugin = worker.plugins.get(CONTEXTS)
    if isinstance(plugin, ContextPlugin):
        return plugin
    if worker.status in ENDING:  # what goes on here is done elsewhere
        raise Reschedule
    _warn_not_installed()
    return None


@functools.cache
def _warn_not_installed() -> None:
    warn(
        "dask_pcm is not installed on this cluster: contexts are loaded in the middle of tasks,"
        " wherever Dask places them. Call dask_pcm.install(client) first.",
    )
