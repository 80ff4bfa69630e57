"""Keeps as many jobs as are wanted: looks at workers and batch systems, submits and cancels."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

from distributed import Scheduler

from dask_pcm.config import Config
from dask_pcm.errors import PoolError
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.pools.fleet import Fleet, Job
from dask_pcm.pools.jobs import Jobs
from dask_pcm.pools.reach import refusal
from dask_pcm.pools.wishes import Wishes
from dask_pcm.scheduling.events import PoolsDeclared
from dask_pcm.scheduling.rules.scaling import needed_workers
from dask_pcm.scheduling.state.state import GateState

logger = logging.getLogger(__name__)

#: Between two looks at workers and wishes; after one that failed.
_LOOK_S, _AFTER_ERROR_S = 0.25, 5.0
#: Of jobs that have ended together, as many outputs are read.
_N_OUTPUTS = 20
#: A worker that is given back has this long to end what it has begun, a batch for instance, and to
#: hand over its results; when the cluster closes, to end.
_RETIRE_S, _END_S = 3600.0, 5.0


class Upkeep:
    """Keeps the jobs of pools as they are wanted; for the cluster's event loop.

    Commands of batch systems take long at times, so each runs in a task of its own: one that hangs
    delays no other pool.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        fleets: Mapping[str, Fleet],
        jobs: Jobs,
        wishes: Wishes,
        poll_s: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._fleets = fleets
        self._jobs = jobs
        self._wishes = wishes
        self._poll_s = poll_s or Config.read().poll_s
        self._polled_at = -math.inf
        # A pool that may have no jobs offers no device.
        offered = {name: f.pool for name, f in fleets.items() if f.pool.max_workers}
        self._device_bytes = {name: pool.device_bytes for name, pool in offered.items()}
        #: Addresses of workers that accept connections.
        self._reached: set[str] = set()
        #: Tasks that run now, by what they do.
        self._running: dict[str, asyncio.Task[None]] = {}
        self._keeping = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """End the workers and their jobs, and wait for submissions: their jobs end, too."""
        self._keeping.cancel()
        ends = (self._end(ws.nanny or ws.address) for ws in self._scheduler.workers.values())
        with suppress(TimeoutError):  # otherwise its job is cancelled
            await asyncio.wait_for(asyncio.gather(*ends, return_exceptions=True), _END_S)
        await asyncio.gather(self._keeping, *self._running.values(), return_exceptions=True)

    async def _end(self, address: str) -> None:
        """End a nanny, or a worker without one; not by a signal, which would be a notice."""
        # One that ends before it has answered is no error; Dask's broadcast would log it as one.
        await self._scheduler.rpc(address).terminate(reason="cluster-closes")

    async def _keep(self) -> None:
        while True:
            pause = _LOOK_S
            try:
                self._look()
            except Exception:  # of ours: jobs are looked after all the same
                logger.exception("The pools could not be looked after; trying again")
                pause = _AFTER_ERROR_S
            await asyncio.sleep(pause)

    def _look(self) -> None:
        """Compare what there is with what is wanted; submit and cancel."""
        gate = self._scheduler.plugins.get(GATE)
        state: GateState | None = None if gate is None else gate.state
        if gate is not None and gate.state.pools != self._device_bytes:  # new, or installed anew
            gate.hub.apply(PoolsDeclared(self._device_bytes))
        self._reached &= self._scheduler.workers.keys()
        for address in self._scheduler.workers.keys() - self._reached:
            ws = self._scheduler.workers[address]
            self._do(f"call {address}", self._call(address, str(ws.name)))
        noticed, needed = self._workers(state)
        now = time.monotonic()
        self._sync(noticed, now)
        if now - self._polled_at >= self._poll_s and any(f.jobs for f in self._fleets.values()):
            self._do("poll", self._poll(now))
        offers = {name: fleet.offer(now) for name, fleet in self._fleets.items()}
        self._wishes.follow(self._scheduler.adaptive_target, state, offers, now)
        for name, fleet in self._fleets.items():
            n_workers, is_adaptive = self._wishes.targets[name], self._wishes.is_adaptive
            steps = fleet.decide(n_workers, needed, is_adaptive, now, self._wishes.most[name])
            if steps.cancel:
                jobs = [fleet.jobs[job] for job in steps.cancel]
                for job in jobs:  # to be cancelled again only once it has been
                    job.cancelled_at = now + 2 * _RETIRE_S
                self._do(f"retire {steps.cancel}", self._retire(name, jobs))
            if steps.n_submit:
                self._do(f"submit {name}", self._submit(name, steps.n_submit))

    async def _call(self, address: str, name: str) -> None:
        """Connect to a new worker; end its job if it accepts no connections."""
        why = await refusal(address, self._scheduler.connection_args)
        if not why:
            self._reached.add(address)
            return
        fleet = self._fleet_of(name)
        if fleet is None or address not in self._scheduler.workers:  # not ours, or gone
            return
        is_said, job = bool(fleet.trouble), str(fleet.job_of(name))
        fleet.unreachable(name, address, why, time.monotonic())
        if not is_said:
            logger.error("Pool %s: %s", fleet.name, fleet.trouble)
        if job in fleet.jobs:
            fleet.jobs[job].cancelled_at = time.monotonic()
        await self._jobs.cancel(fleet.name, [job])

    def _sync(self, noticed: Mapping[str, bool], now: float) -> None:
        """Tell each fleet of its workers."""
        names: dict[str, dict[str, bool]] = {name: {} for name in self._fleets}
        for worker, is_noticed in noticed.items():
            if (mine := self._fleet_of(worker)) is not None:
                names[mine.name][worker] = is_noticed
        for name, fleet in self._fleets.items():
            fleet.sync(names[name], now)

    def _fleet_of(self, worker: str) -> Fleet | None:
        """The fleet of a worker, by its name; a pool's name may begin like another's."""
        found = [one for one in self._fleets.values() if one.job_of(worker) is not None]
        return max(found, key=lambda fleet: len(fleet.name), default=None)

    def _workers(self, state: GateState | None) -> tuple[dict[str, bool], set[str]]:
        """Names of all workers, true if they have a notice; and of those that have work.

        Workers that cannot be reached count for nothing.
        """
        found = self._scheduler.workers
        workers = {address: found[address] for address in self._reached}
        busy = needed_workers(state, workers) if state is not None else set()
        views = state.workers if state is not None else {}
        noticed = {
            str(ws.name): address in views and views[address].is_draining
            for address, ws in workers.items()
        }
        return noticed, {str(w.name) for a, w in workers.items() if a in busy or w.processing}

    def _do(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Run a task, unless the same is being done."""
        if what in self._running:
            work.close()
            return
        task = self._running[what] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._running.pop(what, None))

    async def _poll(self, now: float) -> None:
        """Ask the batch systems what became of the jobs."""
        self._polled_at = now
        asked = {name: list(fleet.jobs) for name, fleet in self._fleets.items()}
        for name, states in (await self._jobs.states(asked)).items():
            fleet = self._fleets[name]
            self._judge(fleet, fleet.answered(states, now))
            if again := fleet.to_cancel_again(states, now):
                for job in again:
                    fleet.jobs[job].cancelled_at = now
                self._do(f"cancel again {name}", self._jobs.cancel(name, again))

    def _judge(self, fleet: Fleet, over: list[Job]) -> None:
        """Jobs are over: say so if they are the last of several that did nothing."""
        # Those that no query has named may go on where this machine's commands do not look.
        if strays := [job.id for job in over if not (job.is_known or job.is_cancelled)]:
            self._do(f"cancel {strays}", self._jobs.cancel(fleet.name, strays))
        idle, now = [job for job in over if job.is_idle], time.monotonic()
        outputs = [self._jobs.output(fleet.name, job.id) for job in idle[:_N_OUTPUTS]]
        for text in outputs if self._jobs.can_exclude(fleet.name) else ():
            if words := fleet.exclude(text, now):
                logger.warning("Pool %s, for ten minutes: %s", fleet.name, words)
        if outputs and fleet.ended_in_vain(outputs[0], now):
            logger.error("Pool %s: %s", fleet.name, fleet.trouble)

    async def _submit(self, name: str, n_jobs: int) -> None:
        """Submit jobs; what is refused is tried again later."""
        fleet = self._fleets[name]
        try:
            excluded = fleet.excluded(time.monotonic())
            ids = await self._jobs.submit(name, self._scheduler.address, n_jobs, excluded)
        except Exception as error:  # not only the batch system's own: none may be asked in a loop
            why = str(error) or repr(error)
            if why != fleet.trouble:
                logger.error("Pool %s: %s", name, why, exc_info=not isinstance(error, PoolError))
            fleet.refused(why, time.monotonic())
        else:
            fleet.submitted(ids, time.monotonic())

    async def _retire(self, name: str, jobs: list[Job]) -> None:
        """End jobs: their workers hand over their results first."""
        names = {worker for job in jobs for worker in job.workers}
        leaving = [ws for ws in self._scheduler.workers.values() if str(ws.name) in names]
        if leaving:
            drains = [self._drain(ws.address) for ws in leaving]
            try:
                await asyncio.wait_for(asyncio.gather(*drains), 2 * _RETIRE_S)
            except TimeoutError:
                logger.warning("Workers %s have not handed over their results", sorted(names))
        for job in jobs:
            job.cancelled_at = time.monotonic()
        await self._jobs.cancel(name, [job.id for job in jobs])

    async def _drain(self, address: str) -> None:
        """Have a worker end what it has begun, hand over its results and leave."""
        try:
            await self._scheduler.rpc(address).pcm_notice(seconds=_RETIRE_S, is_preempted=False)
        except Exception:  # it is without the toolkit, or gone
            await self._scheduler.retire_workers([address], close_workers=True, remove=True)
        while address in self._scheduler.workers:
            await asyncio.sleep(_LOOK_S)
