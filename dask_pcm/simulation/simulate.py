"""``simulate``: run a scenario under a policy and summarise the result."""

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
#: Workers whose spans are all recorded.
_N_CHOSEN = 40


@dataclass(frozen=True, slots=True)
class Result:
    """A scenario under one policy.

    Attributes
    ----------
    makespan_s
        Time at which the last row was done; infinity if some were not.
    end_s
        Time at which the simulation ended, in simulated seconds.
    bound_s
        Lower bound of the makespan under any policy.
    possible_share
        Rows done, relative to the rows that the same workers could have done until the end, each
        from the earliest time at which it could be warm.
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
        """Makespan relative to its lower bound; NaN if that is 0."""
        return self.makespan_s / self.bound_s if self.bound_s else math.nan

    @property
    def rows_per_s(self) -> float:
        """Rows done per second, over the whole simulation."""
        return self.record.n_rows / self.end_s if self.end_s else 0.0


def simulate(scenario: Scenario, policy: str = OURS, seed: int = 0) -> Result:
    """Simulate a scenario; the same seed gives the same result.

    Parameters
    ----------
    policy
        One of ``POLICIES``.
    seed
        Seed of the workers' join times, lifetimes, speeds and links; these do not depend on the
        policy.
    """
    record = Record(_chosen(scenario))
    world = World(scenario, record)
    played: Policy
    played = Gate(world) if policy == OURS else Manager(world, Baseline(policy), seed)
    world.run(played, list(draw_lives(scenario, seed)))
    end_s = record.done_at_s[-1] if record.done_at_s and played.is_done else world.clock.now
    is_whole = played.is_done and record.n_rows >= scenario.n_rows - 1e-6
    # A better policy might have finished later than this one was stopped, so the bound needs
    # workers that join after that.
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
    """The same scenario with pieces and tasks of `task_rows` rows."""
    runs = tuple(replace(run, task_rows=task_rows) for run in scenario.runs)
    return replace(scenario, runs=runs, sweep_task_rows=())


def variants(scenario: Scenario) -> Sequence[tuple[str, Scenario]]:
    """The scenarios of a sweep, each with its label; the scenario itself without a sweep."""
    sizes = scenario.sweep_task_rows
    if not sizes:
        return [("", scenario)]
    return [(f"{size:,} rows a task", with_task_rows(scenario, size)) for size in sizes]


def _chosen(scenario: Scenario) -> frozenset[str]:
    """Evenly spaced workers over all pools, ``_N_CHOSEN`` at most."""
    names = [f"{pool.name}-{i}" for pool in scenario.pools for i in range(pool.n_workers)]
    step = max(1.0, len(names) / _N_CHOSEN)
    return frozenset(names[int(i * step)] for i in range(min(len(names), _N_CHOSEN)))
