"""A gate whose events are written in one line each: time is a number."""

from __future__ import annotations

from dask_pcm.scheduling.actions import Assign, Load
from dask_pcm.scheduling.events import Group, ResidencyReported, Work, WorkerJoined, WorkParked
from dask_pcm.scheduling.policy import decide
from dask_pcm.scheduling.rules.rules import Rules
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.tiers import Tier

A, B = Group(("a",), "infer"), Group(("b",), "infer")


class World:
    """A gate whose events are written in one line each."""

    def __init__(self, *workers, n_lanes=2):
        self.state = GateState()
        self.now = 0.0
        for worker in workers:
            self.tell(WorkerJoined(worker, n_lanes))

    def tell(self, *events):
        for event in events:
            self.state.apply(event, self.now)

    def park(self, n, group=A, start=0, n_rows=1.0, priority=(0,)):
        for i in range(start, start + n):
            self.tell(WorkParked(Work(f"{group.contexts[0]}{i}", group, priority, n_rows)))

    def warm(self, worker, context="a", seconds=0.0):
        self.tell(ResidencyReported(worker, context, Tier.DEVICE, seconds=seconds))

    def decide(self, **options):
        actions = decide(self.state, self.now, Rules(**options))
        self.state.validate()
        return actions

    def learn(self, group, worker, row_s):
        """As of two pieces of work: the first counts for little."""
        device = self.state.workers[worker].device
        for _ in range(2):
            self.state.estimates.cost.observe_rows(group.costs, worker, device, row_s * 100, 100)


def warmed(actions):
    return {action.worker for action in actions if isinstance(action, Load)}


def assigned(actions):
    return [(action.key, action.worker) for action in actions if isinstance(action, Assign)]
