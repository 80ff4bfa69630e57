"""The gate's door in the scheduler: hooks become events, actions become transitions and messages.

Tasks that need a context are parked (see ``parking.py``). To dispatch one, it is restricted to the
worker that the policy chose and sent on to ``processing``.

Everything here runs on the scheduler's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.metrics import monotonic
from distributed.protocol.pickle import dumps
from distributed.scheduler import KilledWorker, TaskState, WorkerState
from tornado.ioloop import PeriodicCallback

from dask_pcm.config import Config
from dask_pcm.context.context import ContextRef
from dask_pcm.errors import LoadError
from dask_pcm.plugins.delivery import PATIENCE_S
from dask_pcm.plugins.scheduler import parking
from dask_pcm.plugins.scheduler.find_refs import find_refs
from dask_pcm.plugins.scheduler.first_batches import Frames
from dask_pcm.plugins.scheduler.losses import Losses
from dask_pcm.plugins.scheduler.scaling import answer_adaptive
from dask_pcm.plugins.scheduler.watchdog import Watch
from dask_pcm.plugins.scheduler.workers import Loads, Member, Refs, RunInfo
from dask_pcm.plugins.staging import Desk
from dask_pcm.plugins.worker.lanes import LANES
from dask_pcm.scheduling.events import (
    Action,
    Assign,
    ContextDeclared,
    Cool,
    Event,
    Fail,
    Group,
    ResidencyReported,
    Restarted,
    RunClosed,
    RunReported,
    Shun,
    Standing,
    Warm,
    Work,
    WorkEnded,
    WorkerJoined,
    WorkerLeft,
    WorkerPaused,
    WorkerTold,
    WorkParked,
    WorkWithdrawn,
)
from dask_pcm.scheduling.rules.scaling import is_needed, n_workers_wanted
from dask_pcm.scheduling.state.state import GateState

logger = logging.getLogger(__name__)

GATE = "pcm-gate"
#: What Dask says of a worker that is gone unasked.
_LOST = ("handle-worker-cleanup", "check-worker-ttl")
_STANDINGS = {
    "loading": Standing.LOADING,
    "device": Standing.WARM,
    "host": Standing.LOWERED,
    "absent": Standing.COLD,
    "failed": Standing.FAILED,
}


class GatePlugin(SchedulerPlugin):
    """Parks tasks that need a context and dispatches them as the policy decides."""

    name = GATE
    idempotent = True  # a second registration must not replace the one that knows what is parked

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config.read()

    async def start(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.state = GateState()
        self.asked: dict[Any, parking.Asked] = {}
        self.refs = Refs()
        self.members: dict[str, Member] = {}
        self.loads: dict[str, Loads] = {}
        self.runs: dict[str, RunInfo] = {}
        self.losses = Losses(scheduler, self._judged)
        #: Tasks that each worker had which is on its way out unasked.
        self._lost_with: dict[str, list[Any]] = {}
        #: Workers that share a host and its cores.
        self._n_on: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._is_to_regroup = False
        self._watch = Watch(self.state, self.config.stall_s)
        #: How many worker processes have lost their device with a task.
        self.n_lost_devices: Counter[Any] = Counter()
        self._loop = asyncio.get_running_loop()
        self._is_woken = False
        self._stimuli = count()
        scheduler.stream_handlers["pcm-hello"] = self.on_hello
        scheduler.stream_handlers["pcm-residency"] = self.on_residency
        scheduler.stream_handlers["long-running"] = self.on_long_running
        scheduler.stream_handlers["pcm-returned"] = self.on_returned
        scheduler.stream_handlers["pcm-notice"] = self.on_notice
        self.desk = Desk(self._tell)
        for op, handle in (
            ("pcm-serves", self.desk.on_serves),
            ("pcm-stage", self.desk.on_stage),
            ("pcm-staged", self.desk.on_staged),
            ("pcm-copied", self.desk.on_copied),
        ):
            scheduler.stream_handlers[op] = self._if_now(handle)
        scheduler.handlers["pcm_run"] = self.on_run
        scheduler.handlers["pcm_release"] = self.on_release
        scheduler.handlers["pcm_lost_device"] = self.on_lost_device
        scheduler.handlers["pcm_losses"] = self.on_losses
        scheduler.handlers["pcm_explain"] = self.on_explain
        scheduler.handlers["pcm_failing"] = Frames(scheduler.task_groups.get).on_failing
        self._undo = (
            parking.shield_from_timeouts(scheduler, self.asked),
            answer_adaptive(scheduler, self._n_wanted),
        )
        self._ticker = PeriodicCallback(self._tick, self.config.tick_s * 1000)
        self._ticker.start()
        self._take_in()

    async def close(self) -> None:
        self._ticker.stop()
        self.losses.close()

    def uninstall(self) -> None:
        """Leave the scheduler; what is parked goes on as plain Dask tasks."""
        self._ticker.stop()
        self.losses.close()
        for undo in self._undo:
            undo()
        self.scheduler.remove_plugin(GATE)
        # Workers and runs may still have something to say, and what is set apart may secede:
        # handlers stay, and find nobody.
        self.members.clear()
        for key, asked in self.asked.items():
            if (ts := self.scheduler.tasks.get(key)) is not None:
                parking.unpark(ts, asked)
        parked = [key for key in self.asked if self._state_of(key) == "no-worker"]
        self.asked.clear()
        self.state = self._watch.state = GateState()
        stimulus_id = f"pcm-uninstall-{next(self._stimuli)}"
        self.scheduler.transitions(dict.fromkeys(reversed(parked), "released"), stimulus_id)

    def _take_in(self) -> None:
        """Take charge of context tasks that were there before the gate."""
        self.update_graph(self.scheduler, tasks=list(self.scheduler.tasks))
        for key, asked in self.asked.items():
            if self._state_of(key) == "no-worker":
                self._apply(WorkParked(self._work(self.scheduler.tasks[key], asked)))
        queued = [key for key in self.asked if self._state_of(key) == "queued"]
        # Released, they come to wait again, and find no worker.
        recommendations = dict.fromkeys(reversed(queued), "released")
        self.scheduler.transitions(recommendations, f"pcm-install-{next(self._stimuli)}")
        for key in queued:
            if self._state_of(key) == "no-worker":  # the plugin's hook is not called yet
                self._apply(WorkParked(self._work(self.scheduler.tasks[key], self.asked[key])))

    def _state_of(self, key: Any) -> str | None:
        ts = self.scheduler.tasks.get(key)
        return None if ts is None else ts.state

    # -- what Dask says ---------------------------------------------------------------------

    def update_graph(
        self, scheduler: Scheduler, *, tasks: list[Any], client: str = "", **kwargs: Any
    ) -> None:
        """Restrict new context tasks to nobody; runs before their first transition."""
        for key in tasks:
            ts = scheduler.tasks.get(key)
            if ts is None or key in self.asked or ts.actor:
                continue
            refs = find_refs(ts.run_spec, [d.run_spec for d in ts.dependencies])
            if not refs:
                continue
            contexts = self._declare(refs)
            self.asked[key] = parking.Asked.of(ts, contexts, client)
            ts.annotations = {**(ts.annotations or {}), "executor": LANES}
            parking.park(ts)

    def transition(
        self, key: Any, start: str, finish: str, *args: Any, stimulus_id: str, **kwargs: Any
    ) -> None:
        if finish == "forgotten":
            self.n_lost_devices.pop(key, None)
        asked = self.asked.get(key)
        if asked is None:
            return
        if start == "processing":
            ts = self.scheduler.tasks.get(key)
            worker = self.state.placed.get(key)
            is_lost = worker is not None and worker not in self.scheduler.workers
            if ts is not None and ts.suspicious and worker is not None and is_lost:
                self._lost_with.setdefault(worker, []).append(key)
                ts.suspicious = 0  # Dask blames whoever was there; the gate, whose fault it was
            self._apply(WorkEnded(key, is_finished=finish == "memory"))
            if ts is not None:
                # On every way out, memory included: a result that is lost is computed again,
                # and that goes through the gate as well.
                parking.park(ts)
        if finish == "no-worker":
            if not self._is_to_be_judged(key):
                self._apply(WorkParked(self._work(self.scheduler.tasks[key], asked)))
        elif start == "no-worker" and finish != "processing":
            self._apply(WorkWithdrawn(key))
        if finish == "forgotten":
            del self.asked[key]
            self.losses.forget(key)
            self.refs.discard(asked.contexts)

    def remove_worker(
        self, scheduler: Scheduler, worker: str, *, stimulus_id: str = "", **kwargs: Any
    ) -> None:
        lost_with = self._lost_with.pop(worker, [])
        member = self.members.pop(worker, None)
        if member is not None:
            self._n_on[member.host, member.cores] -= 1
            if lost_with:
                self._lose(member, self._begun(worker, lost_with))
            self._apply(WorkerLeft(worker, is_lost=stimulus_id.startswith(_LOST)))
            self._is_to_regroup = True
            self.desk.leave(worker)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        for run in [run for run, info in self.runs.items() if info.client == client]:
            self._close_run(run)

    def restart(self, scheduler: Scheduler) -> None:
        self._apply(Restarted())
        # Who asks for new processes does not want what the old ones had.
        self._loop.create_task(self._tell_nannies({"op": "pcm_clear"}))
        for run in list(self.runs):
            self._close_run(run)

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Keep workers that load, that are at work, and that are warm for work that waits."""
        views = ((ws, self.state.workers.get(ws.address)) for ws in workers)
        return [ws for ws, view in views if view is None or not is_needed(self.state, view)]

    # -- what workers and clients say -------------------------------------------------------

    def on_hello(
        self,
        worker: str,
        epoch: str,
        n_lanes: int,
        cores: Iterable[int],
        device_bytes: int | None = None,
        device: str = "",
        pool: str = "",
        ends_in_s: float | None = None,
        **kwargs: Any,
    ) -> None:
        """A worker's plugin is ready."""
        ws, known = self.scheduler.workers.get(worker), self.members.get(worker)
        if ws is None or (known is not None and known.epoch == epoch):
            return
        member = self.members[worker] = Member(epoch, tuple(cores), ws)
        if known is not None:
            self._n_on[known.host, known.cores] -= 1
        self._n_on[member.host, member.cores] += 1
        self.losses.joined(ws.nanny)
        lasts_s = math.inf if ends_in_s is None else ends_in_s
        self._apply(WorkerJoined(worker, n_lanes, device_bytes, ws.host, device, pool, lasts_s))
        self._is_to_regroup = True
        self.desk.leave(worker)  # what an earlier life of it had under way
        self.desk.welcome(worker)

    def on_residency(
        self,
        worker: str,
        epoch: str,
        digest: str,
        tier: str,
        seconds: float,
        error: str | None,
        is_built: bool = False,
        n_bytes: int = 0,
        device_bytes: int | None = None,
        kind: str = "",
        staged_s: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """A context moved on a worker; said by an earlier life of the worker, it is ignored."""
        member = self.members.get(worker)
        if member is None or member.epoch != epoch:
            return
        standing = _STANDINGS[tier]
        if standing is Standing.WARM and is_built:
            loads = self.loads.setdefault(digest, Loads())
            loads.n, loads.seconds = loads.n + 1, loads.seconds + seconds
        said = (seconds, error, is_built, n_bytes, device_bytes, kind, staged_s)
        self._apply(ResidencyReported(worker, digest, standing, *said))

    def on_notice(self, worker: str, epoch: str, seconds: float, **kwargs: Any) -> None:
        """A worker will end in so many seconds: what it has not begun goes elsewhere."""
        member = self.members.get(worker)
        if member is None or member.epoch != epoch:
            return
        self._apply(WorkerTold(worker, seconds))
        self._call_back(worker, list(self.state.workers[worker].running))

    def on_returned(self, worker: str, epoch: str, keys: list[Any], **kwargs: Any) -> None:
        """A worker has not begun these tasks, and does not have them any more."""
        member = self.members.get(worker)
        if member is None or member.epoch != epoch:
            return
        recommendations = {key: "released" for key in keys if self.state.placed.get(key) == worker}
        self.scheduler.transitions(recommendations, f"pcm-returned-{next(self._stimuli)}")

    async def on_run(
        self, run: str, client: str, refs: bytes, kind: str, n_rows: float, n_units: int
    ) -> dict[str, Any]:
        """A client reports what a run will still submit, and learns how its contexts stand.

        `n_units` of 0 closes the run.
        """
        asked: tuple[ContextRef, ...] = pickle.loads(refs)
        contexts = tuple(ref.digest for ref in asked)
        group = Group(contexts, kind, client=client)
        if n_units:
            if run not in self.runs:
                self.runs[run] = RunInfo(client, self._declare(asked))
            self._apply(RunReported(run, group, n_rows, n_units))
        else:
            self._close_run(run)
        loads = [self.loads.get(context, Loads()) for context in contexts]
        views = self.state.workers.values()
        return {
            "n_workers": len(self.state.workers),
            "n_on_cluster": len(self.scheduler.workers),
            "n_warm": sum(view.holds(contexts) for view in views),
            "n_loads": sum(load.n for load in loads),
            "load_s": sum(load.seconds for load in loads),
            "askers": [tuple(one) for one in self.state.askers(group)],
        }

    def _if_now(self, handle: Callable[..., None]) -> Callable[..., None]:
        """A handler that ignores what an earlier life of a worker says."""

        def handle_now(worker: str, epoch: str, **says: Any) -> None:
            member = self.members.get(worker)
            if member is not None and member.epoch == epoch:
                handle(worker, **says)

        return handle_now

    def _tell(self, worker: str, message: dict[str, Any]) -> None:
        member = self.members.get(worker)
        if member is not None:
            self.scheduler.worker_send(worker, {**message, "epoch": member.epoch})

    async def on_lost_device(self, key: Any, is_cause: bool) -> int:
        """A worker process loses its device in a task; answered with how often that has been so."""
        self.n_lost_devices[key] += is_cause
        return self.n_lost_devices[key]

    async def on_losses(self, key: Any) -> int:
        """A task goes on after a loss; answered with how many processes it has cost since it asked.

        Waits until it is clear what its last loss means.
        """
        return await self.losses.ask(key)

    async def on_explain(self, key: Any) -> str:
        """Why a task waits, or where it went and why."""
        return self._watch.explain(key)

    async def on_release(self, digests: list[str]) -> int:
        """A client has workers drop contexts; answered with how many hold one of them."""
        n_holding = 0
        for address, view in self.state.workers.items():
            here = (Standing.WARM, Standing.LOADING, Standing.LOWERED)
            held = [digest for digest in digests if view.standings.get(digest) in here]
            n_holding += bool(held)
            for digest in digests:
                self._tell(address, {"op": "pcm-release", "digest": digest})
        # Also where the worker that had it is gone.
        drops: list[dict[str, Any]] = [{"op": "pcm_drop", "digest": digest} for digest in digests]
        await self._tell_nannies(*drops)
        return n_holding

    async def _tell_nannies(self, *messages: dict[str, Any]) -> None:
        """Tell all nannies; those that do not answer soon are not waited for."""
        told = (
            self.scheduler.broadcast(msg=message, nanny=True, on_error="ignore")
            for message in messages
        )
        telling = [asyncio.ensure_future(one) for one in told]
        if telling:
            await asyncio.wait(telling, timeout=PATIENCE_S)

    # -- what the policy says ---------------------------------------------------------------

    def _wake(self) -> None:
        # Never inside a transition hook: the scheduler is in the middle of one.
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._is_woken = False
        if self._is_to_regroup:
            self._is_to_regroup = False
            self._regroup()
        config = self.config
        rules = (config.pipeline_s, config.n_load_attempts, config.idle_s)
        actions = self._watch.decide(monotonic(), *rules)
        try:
            for action in actions:
                self._act(action)
        finally:  # whatever goes wrong with one: the others count as done
            self._send([action for action in actions if isinstance(action, Assign)])

    def _act(self, action: Action) -> None:
        match action:
            case Warm():
                self._warm(action)
            case Cool(worker, context):
                self._tell(worker, {"op": "pcm-lower", "digest": context})
            case Fail():
                self._fail(action)
            case Shun(host, seconds, error):
                logger.warning("Node %s is left alone for %.3g s: %s", host, seconds, error)

    def _send(self, assigns: list[Assign]) -> None:
        if not assigns:
            return
        recommendations: dict[Any, str] = {}
        for assign in reversed(assigns):  # Dask takes the last recommendation first
            ts = self.scheduler.tasks.get(assign.key)
            if ts is None or ts.state != "no-worker":
                self._apply(WorkWithdrawn(assign.key))
                continue
            parking.restrict(ts, {assign.worker})
            recommendations[assign.key] = "processing"
        self.scheduler.transitions(recommendations, f"pcm-dispatch-{next(self._stimuli)}")
        for key in recommendations:
            ts = self.scheduler.tasks.get(key)
            if ts is not None and ts.state == "processing":
                self._set_apart(ts)
            elif ts is not None and ts.state == "no-worker":
                # The worker was paused or left in between: look again at the next tick.
                parking.park(ts)
                self._sync_pauses()
                self._apply(WorkParked(self._work(ts, self.asked[key])))

    def _set_apart(self, ts: TaskState) -> None:
        """Have a dispatched task take no place among plain ones.

        It runs on a lane, not on one of the worker's threads, as a task does that has seceded. Were
        it counted, a worker with context work in hand would get no plain task.
        """
        ws = ts.processing_on
        if ws is not None and ts not in ws.long_running:
            ws.add_to_long_running(ts)
            self.scheduler.check_idle_saturated(ws)

    def on_long_running(self, key: Any, worker: str, **message: Any) -> None:
        """A task secedes: if it was on a lane, that is free for what the task waits for.

        To Dask it is nothing new there: such a task has been set apart already.
        """
        ts = self.scheduler.tasks.get(key)
        if ts is None or ts.processing_on is None or ts not in ts.processing_on.long_running:
            self.scheduler.handle_long_running(key=key, worker=worker, **message)
        if self.state.placed.get(key) == worker:
            self._apply(WorkEnded(key, is_finished=False))

    def _warm(self, warm: Warm) -> None:
        member = self.members[warm.worker]
        message = {
            "op": "pcm-load",
            "epoch": member.epoch,
            "ref": pickle.dumps(self.refs[warm.context]),
            "n_threads": self._n_threads(member),
        }
        logger.debug("warming %s for %s", warm.worker, warm.context)
        self.scheduler.worker_send(warm.worker, message)

    def _fail(self, fail: Fail) -> None:
        ts = self.scheduler.tasks.get(fail.key)
        if ts is not None and ts.state == "no-worker":
            self._end(ts, LoadError(fail.error))

    def _end(self, ts: TaskState, error: Exception) -> None:
        """A parked task ends with an error."""
        stimulus_id = f"pcm-failed-{next(self._stimuli)}"
        recommendations = self.scheduler.transition(
            ts.key,
            "erred",
            stimulus_id,
            exception=dumps(error),
            exception_text=str(error),
            cause=ts.key,
        )
        self.scheduler.transitions(recommendations, stimulus_id)

    def _n_wanted(self, target_s: float) -> int:
        return n_workers_wanted(self.state, target_s)

    # -- helpers ----------------------------------------------------------------------------

    def _declare(self, refs: Sequence[ContextRef]) -> tuple[str, ...]:
        """Digests of contexts that somebody wants now."""
        for ref in refs:
            known = self.refs.get(ref.digest)
            if known is None or known.device_memory_bytes != ref.device_memory_bytes:
                file_bytes = sum(bundle.n_bytes for bundle in ref.bundles)
                declared = ref.device_memory_bytes, file_bytes
                self._apply(ContextDeclared(ref.digest, ref.name, *declared))
        return self.refs.add(refs)

    def _apply(self, event: Event) -> None:
        self.state.apply(event, monotonic())
        self._wake()

    def _tick(self) -> None:
        self._be_last()
        self._sync_pauses()
        self.desk.dispatch()
        if self.state.waiting or self.runs or self.config.idle_s is not None:
            self._wake()

    def _sync_pauses(self) -> None:
        for address, view in self.state.workers.items():
            is_paused = self.scheduler.workers.get(address) not in self.scheduler.running
            if is_paused != view.is_paused:
                self._apply(WorkerPaused(address, is_paused))
                if is_paused and view.running:
                    self._call_back(address, list(view.running))

    def _call_back(self, worker: str, keys: list[Any]) -> None:
        """Ask for what a worker has not begun; freed from here, it might run twice."""
        message = {"op": "pcm-return", "epoch": self.members[worker].epoch, "keys": keys}
        self.scheduler.worker_send(worker, message)

    def _be_last(self) -> None:
        """Be called after plugins that restrict tasks: what they want then holds at dispatch."""
        plugins = self.scheduler.plugins
        if next(reversed(plugins)) != GATE and GATE in plugins:
            plugins[GATE] = plugins.pop(GATE)

    def _close_run(self, run: str) -> None:
        info = self.runs.pop(run, None)
        if info is not None:
            self._apply(RunClosed(run))
            self.refs.discard(info.contexts)

    def _work(self, ts: TaskState, asked: parking.Asked) -> Work:
        said = ts.annotations or {}
        allowed = parking.allowed(self.scheduler, ts, asked)
        is_alone = ts.key in self.losses.suspects
        group = Group(asked.contexts, ts.prefix.name, allowed, asked.client, is_alone)
        n_rows, cut_for = float(said.get("pcm_rows") or 1.0), str(said.get("pcm_cut_for") or "")
        is_again = ts.key in self.losses.n_lost
        return Work(ts.key, group, tuple(ts.priority or ()), n_rows, cut_for, is_again)

    def _lose(self, member: Member, keys: Sequence[Any]) -> None:
        """A worker is gone that had these tasks in work; the next attempts are told."""
        self._last_lost = member.ws.clean()
        self.losses.lost(member.ws.nanny or "", keys)
        for key in keys:
            if (ts := self.scheduler.tasks.get(key)) is not None:
                lost = {"pcm_lost": self.losses.n_lost[key]}
                ts.annotations = {**(ts.annotations or {}), **lost}
            if self._is_to_be_judged(key):
                self._apply(WorkWithdrawn(key))

    def _begun(self, worker: str, keys: Sequence[Any]) -> Sequence[Any]:
        """Of what a worker had, what it had begun: as many as there are lanes, the first to go."""
        view = self.state.workers.get(worker)
        tasks = [ts for key in keys if (ts := self.scheduler.tasks.get(key)) is not None]
        tasks.sort(key=lambda ts: ts.priority or ())
        return [ts.key for ts in tasks[: view.n_lanes if view else None]]

    def _is_to_be_judged(self, key: Any) -> bool:
        """Whether a task is to stay here until it is clear whose fault its last loss was."""
        return self.losses.is_open(key)

    def _judged(self, keys: Iterable[Any]) -> None:
        """It is clear whose fault a loss was: suspects go on, alone, or have ended enough."""
        for key in keys:
            ts, asked = self.scheduler.tasks.get(key), self.asked.get(key)
            if ts is None or asked is None or ts.state != "no-worker":
                continue
            if self._is_to_be_judged(key):  # there was another
                continue
            if self.losses.n_blamed[key] > self.scheduler.allowed_failures:
                allowed_failures = self.scheduler.allowed_failures
                self._apply(WorkWithdrawn(key))
                self._end(ts, KilledWorker(key, self._last_lost, allowed_failures))
            else:
                self._apply(WorkParked(self._work(ts, asked)))

    def _regroup(self) -> None:
        """Restricted work may find other workers now than when it was parked."""
        for work in list(self.state.waiting.works.values()):
            asked = self.asked[work.key]
            if asked.workers or asked.hosts or work.group.allowed is not None:
                self._apply(WorkParked(self._work(self.scheduler.tasks[work.key], asked)))

    def _n_threads(self, member: Member) -> int:
        """A worker's share of the cores that it and its neighbours may run on."""
        n_neighbours = max(1, self._n_on[member.host, member.cores])
        return self.config.n_threads or max(1, len(member.cores) // n_neighbours)
