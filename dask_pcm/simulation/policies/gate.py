"""Our policy under simulation: turns simulated events into the gate's, and carries out its actions.

``scheduling.policy.decide`` is the production code, with the settings of this process. Units pass
through a window as in a run; ``lanes.py`` models a worker's lanes and device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from dask_pcm.config import Config
from dask_pcm.scheduling.actions import (
    Assign,
    Fail,
    Load,
    Offload,
)
from dask_pcm.scheduling.events import (
    ContextDeclared,
    Event,
    ResidencyReported,
    WorkEnded,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
    WorkWithdrawn,
)
from dask_pcm.scheduling.feed.demand import device_demand
from dask_pcm.scheduling.policy import decide
from dask_pcm.scheduling.rules.rules import Rules
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.simulation.policies.drivers import Drivers
from dask_pcm.simulation.policies.lanes import Lanes
from dask_pcm.simulation.policies.window import SimulatedUnit
from dask_pcm.simulation.world.staging import Swarm
from dask_pcm.simulation.world.world import Worker, World
from dask_pcm.tiers import Tier


class Gate:
    """The scheduler plugin; ``drivers.py`` is the client side of all runs."""

    def __init__(self, world: World) -> None:
        world.staging = Swarm(world.clock, world.links)
        self.state = GateState()
        self.n_decisions = 0
        self._world = world
        self._config = Config.read()
        self._overheads = world.scenario.overheads
        demand = functools.partial(device_demand, self.state)
        self._drivers = Drivers(world.clock, self._config, self._apply, demand)
        self._lanes: dict[str, Lanes] = {}
        self._offloaded: set[tuple[str, str]] = set()
        self._is_woken = False
        self._decided_s = float("-inf")

    @property
    def is_done(self) -> bool:
        """Whether all runs have started and ended."""
        return self._drivers.is_done

    def begin(self) -> None:
        """Declare the contexts, and schedule the start of each run."""
        for spec in self._world.scenario.contexts.values():
            self._apply(ContextDeclared(spec.name, spec.name, spec.device_bytes or None))
        self._drivers.schedule(self._world.scenario.runs)
        self._tick()

    # -- workers --------------------------------------------------------------------------------

    def joined(self, worker: Worker) -> None:
        """A worker has joined."""
        n_lanes = self._config.n_lanes
        self._lanes[worker.name] = Lanes(self._world, worker, n_lanes, self._ended)
        life = worker.life
        device_bytes = self._world.scenario.device_bytes[life.device]
        ends_in_s = life.walltime_s
        self._apply(
            WorkerJoined(
                worker.name, n_lanes, device_bytes, worker.name, life.device, life.pool, ends_in_s
            )
        )

    def draining(self, worker: Worker) -> None:
        """A worker has had notice: it returns unstarted work, and gets only what ends in time."""
        if worker.is_here:
            self._apply(WorkerDraining(worker.name, worker.life.ends_s - self._world.clock.now))
            for unit in self._lanes[worker.name].hand_back():
                self._apply(WorkEnded(unit.key, False))
                self._drivers.park([unit])

    def left(self, worker: Worker) -> None:
        """A worker has left: keep its journalled rows, and park the rest of its units again."""
        self._apply(WorkerLeft(worker.name))
        is_journalled = self._overheads.is_journalled
        for unit, n_kept in self._lanes.pop(worker.name).lose(is_journalled):
            self._world.record.done(n_kept, self._world.clock.now)
            self._drivers.resubmit(unit, n_kept)

    def _ended(self, worker: Worker, unit: SimulatedUnit, seconds: float) -> None:
        """A unit was committed, and the scheduler has its message."""
        self._world.record.done(unit.n_rows, self._world.clock.now)
        self._apply(WorkEnded(unit.key, True))
        self._drivers.collect(unit, seconds)

    # -- the policy -----------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        self.state.apply(event, self._world.clock.now)
        # As in the scheduler, one decision serves all events until it is made; how far apart two
        # are is what the scheduler's other work makes of it.
        if not self._is_woken:
            self._is_woken = True
            self._world.clock.at(self._decided_s + self._overheads.decide_every_s, self._decide)

    def _tick(self) -> None:
        if self._drivers.is_busy and not self._is_woken:
            self._decide()
        self._world.clock.after(self._config.tick_s, self._tick)

    def _decide(self) -> None:
        self._is_woken = False
        self._decided_s = now = self._world.clock.now
        self.n_decisions += 1
        for action in decide(self.state, now, Rules.of(self._config)):
            match action:
                case Assign(key, name):
                    self._assign(key, self._lanes[name])
                case Load(name, context):
                    self._to(name, functools.partial(self._warm, self._lanes[name].worker, context))
                case Offload(name, context):
                    self._offloaded.add((name, context))
                case Fail(key):
                    self._fail(key)

    def _to(self, name: str, act: Callable[[], object]) -> None:
        """Deliver a message to a worker, after the message delay."""
        self._world.later(self._lanes[name].worker, self._overheads.message_s, act)

    def _assign(self, key: object, lanes: Lanes) -> None:
        self._world.record.n_dispatches += 1
        lanes.send(self._drivers.unit(key))

    def _warm(self, worker: Worker, context: str) -> None:
        start_s = self._world.clock.now
        spec = self._world.scenario.contexts[context]

        def report(is_built: bool, tier: Tier) -> None:
            error = "it is broken" if tier is Tier.FAILED else None
            seconds = self._world.clock.now - start_s
            said = ResidencyReported(
                worker.name,
                context,
                tier,
                seconds=seconds,
                error=error,
                is_built=is_built,
                n_bytes=spec.device_bytes,
                device_bytes=self._world.scenario.device_bytes[worker.life.device],
                kind="broken" if error else "",
            )
            self._to(worker.name, lambda: self._apply(said))

        if (worker.name, context) in self._offloaded:
            self._offloaded.discard((worker.name, context))
            self._world.later(worker, spec.restore_s, lambda: report(False, Tier.DEVICE))
            return
        tiers = {True: Tier.DEVICE, False: Tier.FAILED}
        self._world.load(worker, context, lambda is_built: report(is_built, tiers[is_built]))

    def _fail(self, key: object) -> None:
        unit = self._drivers.unit(key)
        self._world.record.rows_failed += unit.n_rows
        self._apply(WorkWithdrawn(key))
        self._drivers.give_up(unit)
