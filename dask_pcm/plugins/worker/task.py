"""Tasks acquire live objects here, with or without the plugin on their worker."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distributed import Reschedule, get_worker, secede, warn
from distributed.threadpoolexecutor import thread_state

from dask_pcm.config import Config
from dask_pcm.context.context import Context, ContextRef
from dask_pcm.errors import LoadError, RecipeError
from dask_pcm.ladder.objects.tensors import is_sticky
from dask_pcm.ladder.store import of_process
from dask_pcm.plugins.worker.contexts import ENDING, WorkerContexts
from dask_pcm.plugins.worker.plugin import CONTEXTS, ContextPlugin
from dask_pcm.plugins.worker.seceding import giving_back
from dask_pcm.plugins.worker.stats import TaskStats

logger = logging.getLogger(__name__)

#: Annotations: of a task that was lost with a worker before, and of one whose client is known.
LOST, CLIENT = "pcm_lost", "pcm_client"
_TIMEOUT_S = 30.0


@contextmanager
def acquire(*contexts: Context) -> Iterator[Any]:
    """Hold the live object of a context inside a task of your own.

    Pass the context as an argument of the task: the gate then sees it, and schedules the task on a
    worker that holds it. The gate does not see a context in a closure, a callable object or a
    scattered value. Such a context is loaded where the task happens to run, with a warning.

    Parameters
    ----------
    *contexts
        One ``Context``, or several. Acquire several in one call: tasks that acquire them one by
        one in different orders deadlock.

    Yields
    ------
    object
        What the loader returned; with several contexts, a list of these. A context is not evicted
        before the block ends. An exclusive context has one holder at a time per worker. Outside a
        cluster the context is loaded in this process and kept. While the task has seceded
        (``compute()``, ``worker_client()``, ``secede()``), other tasks may use the object: use it
        only before, or after the task has rejoined.

    Raises
    ------
    LoadError
        If a context cannot be loaded.
    DeadlockError
        If tasks that acquire several contexts one by one would wait for each other.
    RecipeError
        If it is called in a coroutine, or with something other than a context.

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
            "acquire would block the worker's event loop, on which this coroutine runs, and with"
            " it every heartbeat. Make the task a plain function: def instead of async def."
        )
    for context in contexts:
        if not isinstance(context, Context):
            raise RecipeError(f"acquire takes a dask_pcm.Context; found {context!r:.80}.")
    with hold([context.ref for context in contexts]) as values:
        yield values[0] if len(values) == 1 else values


def _is_in_loop() -> bool:
    """Whether this runs on a worker's event loop; other loops, as in a notebook, may block."""
    try:
        return get_worker().loop.asyncio_loop is asyncio.get_running_loop()
    except (ValueError, RuntimeError):  # no worker; no loop
        return False


@contextmanager
def hold(refs: Sequence[ContextRef], stats: TaskStats | None = None) -> Iterator[list[Any]]:
    """Hold the live objects of `refs`, on any thread of any process; times are added to `stats`.

    On a worker with the plugin they are warm, because the gate sent the task there. Elsewhere (one
    of Dask's local schedulers, a worker without the plugin) they are loaded once in this process
    and kept.
    """
    plugin = _plugin()
    source = plugin.contexts if plugin else of_process()
    store = source.store if isinstance(source, WorkerContexts) else source
    asked = time.perf_counter()
    values, held = source.begin_hold(refs)
    with held, giving_back(store.turns, _tell):
        start = time.perf_counter()
        if stats is not None:
            stats.note_facts(values)
        try:
            yield values
        except Exception as error:
            if plugin and isinstance(error, LoadError):  # of a context that the block wanted
                plugin.contexts.reschedule(refs, error)
            if plugin and is_sticky(error):
                plugin.device.end_task(error)
            raise
        finally:
            if stats is not None:
                stats.waited_s += start - asked
                stats.held_s += time.perf_counter() - start


def _tell(op: str) -> None:
    """Tell the gate what the task on this thread does."""
    try:
        worker, plugin = get_worker(), _plugin()
        key = worker.get_current_task()
    except (ValueError, KeyError):  # no worker; no task of it
        return
    if plugin is not None:
        plugin.tell({"op": op, "key": key})


def attendants(refs: Sequence[ContextRef], values: Sequence[Any]) -> list[Any]:
    """What serves the contexts that this thread holds; the live object itself if nothing does."""
    plugin = _plugin()
    store = plugin.contexts.store if plugin else of_process()
    found = [store.attendant(ref.digest) for ref in refs]
    return [v if one is None else one for one, v in zip(found, values, strict=True)]


def settings() -> Config:
    """The settings with which the toolkit was installed; outside of a worker, this process's."""
    plugin = _plugin()
    return Config.read() if plugin is None else plugin.config


def hand_over(n_rows: int) -> None:
    """Leave the lane of the task on this thread, of which `n_rows` rows are still being served.

    The lane is free for other tasks, and the gate goes on to count these rows as in flight. Does
    nothing outside a lane.
    """
    try:
        worker, plugin = get_worker(), _plugin()
    except ValueError:
        return
    if plugin is None or getattr(thread_state, "executor", None) is None:
        return
    plugin.tell({"op": "pcm-handed-over", "key": worker.get_current_task(), "n_rows": n_rows})
    secede()


def stops_at() -> float:
    """When work on this thread's worker has to have ended, by the monotonic clock.

    Infinity if its end is not known, and outside of workers.
    """
    try:
        plugin = get_worker().plugins.get(CONTEXTS)
    except ValueError:
        return math.inf
    return plugin.drain.stops_at if isinstance(plugin, ContextPlugin) else math.inf


def was_lost() -> bool:
    """Whether the task on this thread was lost with a worker before, for any reason."""
    return bool(_annotation(LOST))


def client_of_task() -> str:
    """The id of the client whose task runs on this thread; "" if it is not known."""
    return str(_annotation(CLIENT) or "")


def _annotation(name: str) -> Any:
    """An annotation of the task on this thread; None if it has none, and outside of tasks."""
    try:
        worker = get_worker()
        ts = worker.state.tasks.get(worker.get_current_task())
    except (ValueError, KeyError):  # no worker; no task of it
        return None
    return None if ts is None else (ts.annotations or {}).get(name)


def n_losses() -> int:
    """How many worker losses were attributed to the task on this thread since the last call.

    Losses by a crash or an OOM kill count, preemptions do not. May block for seconds, until the
    latest loss is attributed. Each call resets the count by which the gate ends a task, so the
    caller must have made progress since the last one. Returns 0 if there is no gate, or no answer.
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
        logger.warning("The scheduler did not answer about losses of %s: %r", key, error)
        return 0
    return int(found or 0)  # a scheduler that has lost the gate returns None


def _plugin() -> ContextPlugin | None:
    """The plugin of this thread's worker; None if there is no worker, or no plugin.

    Raises
    ------
    Reschedule
        If the worker is shutting down and has lost its plugin already.
    """
    try:
        worker = get_worker()
    except ValueError:
        return None
    plugin = worker.plugins.get(CONTEXTS)
    if isinstance(plugin, ContextPlugin):
        return plugin
    if worker.status in ENDING:  # do not load a context for a task that runs again elsewhere
        raise Reschedule
    _warn_not_installed()
    return None


@functools.cache
def _warn_not_installed() -> None:
    """Warn once per process."""
    warn(
        "dask_pcm is not installed on this cluster: contexts are loaded in the middle of tasks, on"
        " any worker that Dask chooses. Call dask_pcm.install(client) first.",
    )
