"""A lower bound of the makespan under any policy, by water-filling over worker lifetimes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dask_pcm.simulation.scenario.scenario import RunSpec, Scenario
from dask_pcm.simulation.world.lives import Life, draw_lives


def warm_after_s(life: Life, run: RunSpec, scenario: Scenario) -> float:
    """Least seconds from a worker's join until it is warm.

    Files arrive one after another at the speed of its link, each is unpacked while the next
    arrives, and then the contexts are built.
    """
    arrived_s = unpacked_s = load_s = 0.0
    for context in (scenario.contexts[name] for name in run.contexts):
        for file in context.files:
            arrived_s += file.n_bytes / life.link_bytes_s
            unpacked_s = max(unpacked_s, arrived_s + file.unpack_s[life.device])
        load_s += context.load_s[life.device]
    return max(arrived_s, unpacked_s) + load_s


def lives_until(scenario: Scenario, seed: int, horizon_s: float) -> Iterator[Life]:
    """Working workers that join before `horizon_s`."""
    for place in draw_lives(scenario, seed):
        for life in place:
            if life.joins_s >= horizon_s:
                break
            if life.broken is None:
                yield life


def possible_rows(scenario: Scenario, lives: Sequence[Life], until_s: float) -> float:
    """Rows that workers could do by `until_s`, each from the earliest time it could be warm."""
    speeds = _speeds(scenario, lives, scenario.runs)
    return sum(max(0.0, min(until_s, end_s) - ready_s) * per_s for ready_s, end_s, per_s in speeds)


def bound_s(scenario: Scenario, lives: Sequence[Life]) -> float:
    """Lower bound of the makespan, in seconds.

    The largest of: each run alone on all workers, and all rows at the cost of the cheapest run.
    With one context the water-filling is exact.
    """
    alone = [_fill_s(run.n_rows, _speeds(scenario, lives, [run])) for run in scenario.runs]
    return max(*alone, _fill_s(scenario.n_rows, _speeds(scenario, lives, scenario.runs)))


def _speeds(
    scenario: Scenario, lives: Sequence[Life], runs: Sequence[RunSpec]
) -> list[tuple[float, float, float]]:
    """(earliest warm time, end, highest rows per second) of each worker."""
    speeds = []
    for life in lives:
        soonest = (life.joins_s + warm_after_s(life, run, scenario) for run in runs)
        ready_s = max(min(soonest), min(run.starts_s for run in runs))
        row_s = min(scenario.effective_row_s(run, life.device) for run in runs) * life.slowness
        if ready_s < life.ends_s:
            speeds.append((ready_s, life.ends_s, 1.0 / row_s))
    return speeds


def _fill_s(n_rows: float, speeds: Sequence[tuple[float, float, float]]) -> float:
    """The earliest time by which `n_rows` can be done; infinity if never."""
    steps = [(ready_s, per_s) for ready_s, _, per_s in speeds]
    steps += [(end_s, -per_s) for _, end_s, per_s in speeds if math.isfinite(end_s)]
    per_s = now_s = 0.0
    for at_s, change in sorted(steps):
        # Sums of speeds that have come and gone are not exactly 0.
        if per_s > 1e-12 and n_rows <= per_s * (at_s - now_s):
            break
        n_rows -= per_s * (at_s - now_s)
        now_s, per_s = at_s, per_s + change
    return now_s + n_rows / per_s if per_s > 1e-12 else math.inf
