"""Worker lifetimes, speeds and links are drawn once from the seed, the same for every policy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dask_pcm.simulation.scenario.scenario import Broken, Pool, Scenario


@dataclass(frozen=True, slots=True)
class Life:
    """One worker's lifetime.

    Attributes
    ----------
    joins_s, ends_s
        Times of joining and end, in simulated seconds.
    notice_at_s
        Time of its notice of preemption; infinity without one.
    slowness
        Its seconds per row, relative to those of its device model.
    link_bytes_s
        Bandwidth of its link in each direction, in bytes per second.
    broken
        How its loads fail; None for a worker that works.
    walltime_s
        Upper limit of its lifetime, known in advance.
    """

    worker: str
    pool: str
    device: str
    joins_s: float
    ends_s: float
    notice_at_s: float
    slowness: float
    link_bytes_s: float
    broken: Broken | None
    walltime_s: float = math.inf


def draw_lives(scenario: Scenario, seed: int) -> Iterator[Iterator[Life]]:
    """For each place of each pool, the successive workers in it.

    Each place has its own random stream, so lives in one place do not depend on how many were
    drawn in another.
    """
    for index, pool in enumerate(scenario.pools):
        for place in range(pool.n_workers):
            yield _take_place(pool, place, np.random.default_rng([seed, index, place]))


def _take_place(pool: Pool, place: int, random: np.random.Generator) -> Iterator[Life]:
    """The successive workers in one place of a pool."""
    joins_s = (
        pool.joins_s[place] if pool.joins_s else random.uniform(*pool.joins_within_s or (0, 0))
    )
    is_broken = pool.broken is not None and place < pool.broken.n_workers
    number = 0
    while True:
        # Both are drawn even in a pool whose workers are all alike: a spread that is set later then
        # changes speeds and links, and not the lifetimes that are drawn next.
        slowness = math.exp(pool.row_spread * random.standard_normal())
        link_bytes_s = _link(pool, random.random())
        lasts_s = random.exponential(pool.life_s) if pool.life_s else math.inf
        ends_s = joins_s + min(lasts_s, pool.walltime_s or math.inf)
        lost_s = pool.lost_s[place] if pool.lost_s and not number else None
        ends_s = ends_s if lost_s is None else min(ends_s, max(joins_s, lost_s))
        notice_at_s = math.inf if pool.notice_s is None else max(joins_s, ends_s - pool.notice_s)
        yield Life(
            f"{pool.name}-{place}" + (f".{number}" if number else ""),
            pool.name,
            pool.device,
            joins_s,
            ends_s,
            notice_at_s,
            slowness,
            link_bytes_s,
            pool.broken if is_broken else None,
            pool.walltime_s or math.inf,
        )
        if pool.rejoins_after_s is None or math.isinf(ends_s):
            return
        joins_s, number = ends_s + pool.rejoins_after_s, number + 1


def _link(pool: Pool, at: float) -> float:
    """The bandwidth at quantile `at` of the pool's bandwidth distribution."""
    for bytes_s, share in pool.link_bytes_s:
        if at < share:
            return bytes_s
        at -= share
    return pool.link_bytes_s[-1][0]
