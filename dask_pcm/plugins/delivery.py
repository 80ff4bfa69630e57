"""Plugins are sent to every present worker and nanny; one that hangs does not block the others.

Dask's own registration waits for every answer: forever if one worker is frozen, and with an error
if one is lost at that moment. Here each worker gets its own request. The client waits only for
those that answer soon; the requests to the others are repeated until they answer or are gone.
Workers that join later get their plugins from Dask.

Everything here runs on the scheduler's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from distributed import Scheduler
from distributed.core import clean_exception, connect, send_recv
from distributed.protocol.pickle import dumps

logger = logging.getLogger(__name__)

#: How long a client waits for answers: a worker has to import the package first. And the interval
#: between two requests to a worker that cannot be reached.
PATIENCE_S, _AGAIN_S = 15.0, 1.0


async def ask_workers(function: bytes, dask_scheduler: Scheduler) -> dict[str, Any]:
    """Call a pickled function on all workers; return the results of those that answer in time."""

    async def ask(address: str) -> Any:
        return await _ask(dask_scheduler, address, op="run", function=function)

    answers = await _gather(dask_scheduler, list(dask_scheduler.workers), ask)
    return {address: answer["result"] for address, answer in answers.items()}


async def deliver(
    plugin: bytes,
    name: str,
    again: Callable[..., Any],
    awaited: Collection[str],
    dask_scheduler: Scheduler,
) -> None:
    """Set up a plugin on all workers, or call `again` on them if it is registered already.

    Only the workers in `awaited` are waited for: the others did not answer before.
    """
    plugins = dask_scheduler.worker_plugins
    message: dict[str, Any] = {"op": "plugin-add", "plugin": plugin, "name": name}
    if name in plugins:
        message = {"op": "run", "function": dumps(again)}
    plugin = plugins.setdefault(name, plugin)

    async def send(address: str) -> Any:
        def is_wanted() -> bool:
            # By identity: after an uninstall and a new install another send is under way.
            return address in dask_scheduler.workers and plugins.get(name) is plugin

        return await _persist(dask_scheduler, address, is_wanted, message)

    await _gather(dask_scheduler, list(dask_scheduler.workers), send, awaited)


async def deliver_to_nannies(
    plugin: bytes, name: str, awaited: Collection[str], dask_scheduler: Scheduler
) -> None:
    """Set up a plugin on all nannies, including those whose worker is still starting.

    Only the nannies of the workers in `awaited` are waited for.
    """
    plugins = dask_scheduler.nanny_plugins
    if name in plugins:
        return
    plugins[name] = plugin
    message = {"op": "plugin_add", "plugin": plugin, "name": name}

    async def send(address: str) -> Any:
        def is_wanted() -> bool:
            return address in _nannies(dask_scheduler) and plugins.get(name) is plugin

        return await _persist(dask_scheduler, address, is_wanted, message)

    workers = dask_scheduler.workers
    of_awaited = {ws.nanny for each in awaited if (ws := workers.get(each)) and ws.nanny}
    await _gather(dask_scheduler, _nannies(dask_scheduler), send, of_awaited)


async def withdraw(name: str, is_nannys: bool, dask_scheduler: Scheduler) -> None:
    """Remove a plugin from all workers or nannies; does nothing if it is not registered."""
    plugins = dask_scheduler.nanny_plugins if is_nannys else dask_scheduler.worker_plugins
    # First from the scheduler: workers that join meanwhile do not get it any more.
    if plugins.pop(name, None) is None:
        return
    op = "plugin_remove" if is_nannys else "plugin-remove"
    there = _nannies(dask_scheduler) if is_nannys else list(dask_scheduler.workers)

    async def send(address: str) -> Any:
        return await _ask(dask_scheduler, address, op=op, name=name)

    await _gather(dask_scheduler, there, send)


def _nannies(scheduler: Scheduler) -> list[str]:
    """Addresses of all nannies, each once; `_starting_nannies` have no worker yet."""
    of_workers = [ws.nanny for ws in scheduler.workers.values() if ws.nanny]
    return list(dict.fromkeys([*of_workers, *scheduler._starting_nannies]))


async def _gather(
    scheduler: Scheduler,
    addresses: Collection[str],
    ask: Callable[[str], Awaitable[Any]],
    awaited: Collection[str] | None = None,
) -> dict[str, Any]:
    """Call `ask` for all addresses concurrently; return the answers that came in time.

    Addresses that cannot be reached are left out.

    Parameters
    ----------
    awaited
        The addresses to wait for; all if left out.

    Raises
    ------
    Exception
        The first exception that an answer carries.
    """
    answers: dict[str, Any] = {}
    answered = asyncio.Event()
    left = set(addresses if awaited is None else awaited).intersection(addresses)

    async def ask_one(address: str) -> None:
        try:
            answers[address] = await ask(address)
        except (OSError, TimeoutError) as error:
            logger.info("%s does not answer: %r", address, error)
        finally:
            left.discard(address)
            if not left:
                answered.set()

    # Not tasks of this coroutine: requests that nothing waits for go on after it has returned.
    for address in addresses:
        scheduler._ongoing_background_tasks.call_soon(ask_one, address)
    try:
        if left:
            await asyncio.wait_for(answered.wait(), PATIENCE_S)
    except TimeoutError:
        logger.warning("No answer within %g s, going on without: %s", PATIENCE_S, left)
    for answer in list(answers.values()):
        if answer is not None and answer["status"] == "error":
            _, error, traceback = clean_exception(**answer)
            assert error is not None
            raise error.with_traceback(traceback)
    return {address: answer for address, answer in answers.items() if answer is not None}


async def _persist(
    scheduler: Scheduler, address: str, is_wanted: Callable[[], bool], message: dict[str, Any]
) -> Any:
    """Repeat a request until it is answered; None if it is not wanted any more."""
    while is_wanted():
        try:
            return await _ask(scheduler, address, **message)
        except (OSError, TimeoutError) as error:
            logger.info("%s cannot be reached, trying again: %r", address, error)
            await asyncio.sleep(_AGAIN_S)
    return None


async def _ask(scheduler: Scheduler, address: str, **message: Any) -> Any:
    """Send one request on a connection of its own."""
    # Not from the scheduler's pool: its connections do not deserialize what they receive.
    comm = await connect(address, **scheduler.connection_args)
    try:
        return await send_recv(comm, **message)
    finally:
        comm.abort()
