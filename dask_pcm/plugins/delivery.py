"""How plugins come to the workers and nannies that are there, whether or not all of them answer.

Dask's own registration asks all of them and waits for every answer: for ever where one is frozen,
and with an error where one is lost at that moment. Here each is asked by itself. The client waits
for those that answer soon; the others are asked until they have answered or are gone. Workers that
join later get their plugins from Dask.

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

#: How long a client waits for answers (a worker imports the package first); and between two
#: attempts at what cannot be reached.
PATIENCE_S, _AGAIN_S = 15.0, 1.0


async def ask_workers(function: bytes, dask_scheduler: Scheduler) -> dict[str, Any]:
    """Call a pickled function on all workers; what it returns on those that answer in time."""

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
    """Have all workers set up a plugin, or call `again` on them where it is registered already.

    Only those in `awaited` are waited for: the others have been silent before.
    """
    plugins = dask_scheduler.worker_plugins
    message: dict[str, Any] = {"op": "plugin-add", "plugin": plugin, "name": name}
    if name in plugins:
        message = {"op": "run", "function": dumps(again)}
    plugin = plugins.setdefault(name, plugin)

    async def send(address: str) -> Any:
        def is_wanted() -> bool:
            return address in dask_scheduler.workers and plugins.get(name) is plugin

        return await _persist(dask_scheduler, address, is_wanted, message)

    await _gather(dask_scheduler, list(dask_scheduler.workers), send, awaited)


async def deliver_to_nannies(
    plugin: bytes, name: str, awaited: Collection[str], dask_scheduler: Scheduler
) -> None:
    """Have all nannies set up a plugin, those as well that are about to start their worker.

    Only those of the workers in `awaited` are waited for.
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
    """Have all workers, or nannies, drop a plugin; nothing happens where it is not registered."""
    plugins = dask_scheduler.nanny_plugins if is_nannys else dask_scheduler.worker_plugins
    if plugins.pop(name, None) is None:
        return
    op = "plugin_remove" if is_nannys else "plugin-remove"
    there = _nannies(dask_scheduler) if is_nannys else list(dask_scheduler.workers)

    async def send(address: str) -> Any:
        return await _ask(dask_scheduler, address, op=op, name=name)

    await _gather(dask_scheduler, there, send)


def _nannies(scheduler: Scheduler) -> list[str]:
    of_workers = [ws.nanny for ws in scheduler.workers.values() if ws.nanny]
    return list(dict.fromkeys([*of_workers, *scheduler._starting_nannies]))


async def _gather(
    scheduler: Scheduler,
    addresses: Collection[str],
    ask: Callable[[str], Awaitable[Any]],
    awaited: Collection[str] | None = None,
) -> dict[str, Any]:
    """Ask all at once; the answers that came in time, without those that cannot be reached.

    Parameters
    ----------
    awaited
        Which of them are waited for; all if left out.

    Raises
    ------
    Exception
        What was raised where it was asked.
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

    for address in addresses:
        scheduler._ongoing_background_tasks.call_soon(ask_one, address)
    try:
        if left:
            await asyncio.wait_for(answered.wait(), PATIENCE_S)
    except TimeoutError:
        logger.warning("Not waiting for what does not answer within %g s: %s", PATIENCE_S, left)
    for answer in list(answers.values()):
        if answer is not None and answer["status"] == "error":
            _, error, traceback = clean_exception(**answer)
            assert error is not None
            raise error.with_traceback(traceback)
    return {address: answer for address, answer in answers.items() if answer is not None}


async def _persist(
    scheduler: Scheduler, address: str, is_wanted: Callable[[], bool], message: dict[str, Any]
) -> Any:
    """Ask until there is an answer; None where it is not wanted any more."""
    while is_wanted():
        try:
            return await _ask(scheduler, address, **message)
        except (OSError, TimeoutError) as error:
            logger.info("%s will be asked again: %r", address, error)
            await asyncio.sleep(_AGAIN_S)
    return None


async def _ask(scheduler: Scheduler, address: str, **message: Any) -> Any:
    # Not from the pool of the scheduler: its connections leave what is received pickled.
    comm = await connect(address, **scheduler.connection_args)
    try:
        return await send_recv(comm, **message)
    finally:
        comm.abort()
