"""Simulates a scenario under a policy, and sums up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dask_pcm.simulation.policies.baselines import Baseline, Manager
from dask_pcm.simulation.policies.bound import bound_s, lives_until, possible_rows
from dask_pcm.simulation.policies.gate import Gate
from dask_pcm.simulation.scenario.scenario import Scenario
from dask_pcm.simulation.world.lives import draw_lives
from dask_pcm.simulation.world.record import Record
from dask_pcm.simulation.world.world import Policy, World

OURS = "ours"
POLICIES = (OURS, *(kind.value for kind in reversed(Baseline)))
_LATER_S = 3_600.0
#: Workers of which every span is noted.
_N_CHOSEN = 40


@dataclass(frozen=True, slots=True)
class Result:
    """A scenario under one policy.

    Attributes
    ----------
    makespan_s
        When the last row was done; infinity where not all were.
    bound_s
        No policy is done sooner.
    possible_share
        Rows done, over those that the same workers could have done until the end, each from the
        moment when it could first be warm.
    record
        What happened.
    """

    scenario: Scenario
    policy: str
    seed: int
    makespan_s: float
    end_s: float
    bound_s: float
    possible_share: float
    record: Record

    @property
    def over_bound(self) -> float:
        return self.makespan_s / self.bound_s if self.bound_s else math.nan

    @property
    def rows_per_s(self) -> float:
        return self.record.n_rows / self.end_s if self.end_s else 0.0


def simulate(scenario: Scenario, policy: str = OURS, seed: int = 0) -> Result:
    """Simulate a scenario; the same with the same seed.

    Parameters
    ----------
    policy
        One of ``POLICIES``.
    seed
        Of the workers' joins, lives, speeds and links, which are the same for every policy.
    """
    record = Record(_chosen(scenario))
    world = World(scenario, record)
    played: Policy
    played = Gate(world) if policy == OURS else Manager(world, Baseline(policy), seed)
    world.run(played, list(draw_lives(scenario, seed)))
    end_s = record.done_at_s[-1] if record.done_at_s and played.is_done else world.clock.now
    is_whole = played.is_done and record.n_rows >= scenario.n_rows - 1e-6
    # What did not end may end later than it was given up, under a better policy.
    lives = list(lives_until(scenario, seed, world.clock.now + (0.0 if is_whole else _LATER_S)))
    possible = possible_rows(scenario, lives, end_s)
    return Result(
        scenario,
        policy,
        seed,
        end_s if is_whole else math.inf,
        end_s,
        bound_s(scenario, lives),
        record.n_rows / possible if possible else math.nan,
        record,
    )


def with_task_rows(scenario: Scenario, task_rows: int) -> Scenario:
    """The same with pieces, and tasks, of another size."""
    runs = tuple(replace(run, task_rows=task_rows) for run in scenario.runs)
    return replace(scenario, runs=runs, sweep_task_rows=())


def variants(scenario: Scenario) -> Sequence[tuple[str, Scenario]]:
    """What a scenario asks to be simulated one after another, with what tells them apart."""
    sizes = scenario.sweep_task_rows
    if not sizes:
        return [("", scenario)]
    return [(f"{size:,} rows a task", with_task_rows(scenario, size)) for size in sizes]


def _chosen(scenario: Scenario) -> frozenset[str]:
    """Some workers of each pool, more of the larger ones, spread over them evenly."""
    names = [f"{pool.name}-{i}" for pool in scenario.pools for i in range(pool.n_workers)]
    step = max(1.0, len(names) / _N_CHOSEN)
    return frozenset(names[int(i * step)] for i in range(min(len(names), _N_CHOSEN)))
